"""A follower carries out the plans of its epoch in their order, says so, and ends when it can't."""

from __future__ import annotations

import concurrent.futures
import contextlib
import types
from collections.abc import Iterator
from typing import Any

import pytest

from tests.support.ports import free_port
from tests.support.waiting import wait_until
from workers.host.follower import PROBE_EVERY, follow
from workers.host.streams import LeaderServer, LinkError, connect
from workers.messages.frames import Hello
from workers.messages.plan import DecodeRow, Plan
from workers.runtime.profiler import Profiler


class _Runtime:
    """Notes what it is given. Waiting for a plan numbered `broken` fails, as when a device is lost."""

    def __init__(self, broken: int = 0) -> None:
        self.executed: list[Plan] = []
        self.probed = 0
        self._broken = broken

    def execute(self, plan: Plan) -> Any:
        self.executed.append(plan)
        return types.SimpleNamespace(plan=plan)

    def wait(self, pending: Any) -> None:
        if pending.plan.number == self._broken:
            raise RuntimeError("the device is lost")

    def probe(self) -> float:
        self.probed += 1
        return 0.001


def _plan(number: int) -> Plan:
    return Plan(number, (), (), (DecodeRow(0, number),))


@contextlib.contextmanager
def _following(runtime: Any, epoch: int = 3) -> Iterator[tuple[LeaderServer, concurrent.futures.Future[None]]]:
    """A leader, and a follower of rank 1 that believes in an epoch."""
    address = f"127.0.0.1:{free_port('127.0.0.1')}"
    server = LeaderServer(address, epoch=3, secret=b"s", silence=1.5)
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        try:
            link = connect(address, Hello(3, b"s", 1), 5)
            server.wait_for_followers(1, 5)
            yield server, pool.submit(follow, runtime, link, epoch, Profiler())
        finally:
            server.close()


def test_plans_are_carried_out_in_their_order_and_reported() -> None:
    runtime, count = _Runtime(), PROBE_EVERY + 3
    with _following(runtime) as (server, following):
        for number in range(1, count + 1):
            server.broadcast(_plan(number))
        wait_until(lambda: server.done[1] == count, 10)
        assert runtime.executed == [_plan(number) for number in range(1, count + 1)]
        assert runtime.probed == 1
        server.close()
        following.result(timeout=5)


@pytest.mark.parametrize(("epoch", "numbers", "message"), [(4, [1], "plan 1 of epoch 3"), (3, [1, 3], "2 of 3 is due")])
def test_a_plan_of_another_epoch_or_out_of_order_is_not_carried_out(
    epoch: int, numbers: list[int], message: str
) -> None:
    runtime = _Runtime()
    with _following(runtime, epoch) as (server, following):
        for number in numbers:
            server.broadcast(_plan(number))
        with pytest.raises(LinkError, match=message):
            following.result(timeout=5)
    assert len(runtime.executed) == len(numbers) - 1


def test_when_its_devices_fail_it_ends_and_the_leader_accuses_it() -> None:
    with _following(_Runtime(broken=2)) as (server, following):
        server.broadcast(_plan(1))
        server.broadcast(_plan(2))
        following.result(timeout=5)
        wait_until(lambda: server.broken.rank == 1, 5)
