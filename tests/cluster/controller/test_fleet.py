"""As many replicas live as are wanted; those that are too many finish what they have."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from typing import Any, cast

import pytest

from cluster.config.schema import Config
from cluster.controller import fleet as module
from cluster.controller.autoscaler import Autoscaler, Signals
from cluster.controller.fleet import Fleet
from cluster.controller.integrity import Digests
from cluster.controller.view import ReplicaView
from grok.serving.v1 import cluster_pb2
from tests.conftest import DEMO
from workers.messages.specs import ModelSpec

READY, DRAINING = cluster_pb2.REPLICA_STATE_READY, cluster_pb2.REPLICA_STATE_DRAINING


class _Replica:
    """Serves in the epoch after the one that it is given, until cancelled. It has requests while its number is in `busy`."""

    log_fields: dict[str, Any] = {}
    busy: set[int] = set()

    def __init__(self, index: int, *others: Any) -> None:
        *_, epoch, _, _, _ = others
        self.index, self.epoch, self.state, self.outdated = index, epoch + 1, READY, False

    @property
    def view(self) -> ReplicaView:
        return ReplicaView(self.index, self.state, self.epoch)

    async def drain(self) -> None:
        self.state = DRAINING
        while self.index in self.busy:
            await asyncio.sleep(0.001)

    async def run(self) -> None:
        await asyncio.Event().wait()


class _Placements:
    """Nothing is left of another controller."""

    async def running(self) -> tuple[list[Any], dict[int, int]]:
        return [], {}


@contextlib.asynccontextmanager
async def _fleet(monkeypatch: pytest.MonkeyPatch, wanted: list[int]) -> AsyncIterator[Fleet]:
    """A fleet that runs while the block does; the autoscaler wants the first of `wanted`."""

    def says(self: Autoscaler, signals: Signals) -> int:
        del self, signals
        return wanted[0]

    monkeypatch.setattr(module, "Replica", _Replica)
    monkeypatch.setattr(module, "DECIDE_SECONDS", 0.005)
    monkeypatch.setattr(Autoscaler, "wanted", says)
    config = Config(ModelSpec("demo", str(DEMO)), replicas=wanted[0])
    fleet = Fleet([config], cast(Any, _Placements()), Digests({}), list)
    running = asyncio.ensure_future(fleet.run())
    try:
        yield fleet
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


async def _until(reached: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not reached():
            await asyncio.sleep(0.001)


def _alive(fleet: Fleet) -> list[tuple[int, int]]:
    return [(replica.index, replica.epoch) for replica in fleet.replicas]


def test_replicas_come_and_go_as_they_are_wanted_and_a_number_that_is_used_again_goes_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def play() -> None:
        wanted = [1]
        async with _fleet(monkeypatch, wanted) as fleet:
            await _until(lambda: _alive(fleet) == [(0, 1)])
            wanted[0] = 3
            await _until(lambda: _alive(fleet) == [(0, 1), (1, 1), (2, 1)])
            wanted[0] = 2
            await _until(lambda: _alive(fleet) == [(0, 1), (1, 1)])
            wanted[0] = 3
            await _until(lambda: _alive(fleet) == [(0, 1), (1, 1), (2, 2)])

    asyncio.run(play())


def test_a_replica_that_does_not_serve_goes_first_and_one_that_has_requests_finishes_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def play() -> None:
        wanted = [3]
        async with _fleet(monkeypatch, wanted) as fleet:
            await _until(lambda: len(fleet.replicas) == 3)
            monkeypatch.setattr(_Replica, "busy", {2})
            fleet.replicas[0].state = cluster_pb2.REPLICA_STATE_STARTING
            wanted[0] = 1
            await _until(lambda: _alive(fleet) == [(1, 1), (2, 1)])
            assert [replica.state for replica in fleet.replicas] == [READY, DRAINING]
            _Replica.busy.clear()
            await _until(lambda: _alive(fleet) == [(1, 1)])

    asyncio.run(play())
