"""The life of a replica whose hosts are played: who is replaced by whom, and when it is given up."""

from __future__ import annotations

import asyncio
import dataclasses
import types
from typing import Any

import pytest

from cluster import supervisor
from cluster.config import Config, ModelSection
from cluster.gateway.router import Router
from cluster.placement import Placement
from cluster.supervisor import GIVE_UP_FAILURES, Replica
from cluster.suspects import TOO_MANY, Suspects
from grok.serving.v1 import cluster_pb2
from tests.conftest import DEMO
from workers.assignment import Endpoint


class _Dead:
    """A call of a worker that is gone."""

    def remote(self, *_: object) -> Any:
        result = asyncio.get_running_loop().create_future()
        result.set_exception(OSError("the worker is gone"))
        result.exception()  # whether anybody asks or not
        return result


@dataclasses.dataclass
class _Placement:
    """A host on `node` whose workers die as soon as they are to join a mesh."""

    node: str
    log: list[str]

    @property
    def hosts(self) -> list[Any]:
        return [types.SimpleNamespace(form=_Dead(), progress=_Dead())]

    async def endpoints(self) -> list[Endpoint]:
        return [Endpoint("10.0.0.1", 1, self.node, 1, 2, 3)]

    async def silent(self) -> list[int]:
        return [0]

    async def renew(self) -> _Placement | None:
        self.log.append(f"renew {self.node}")
        return _Placement(self.node, self.log)

    def remove(self) -> None:
        self.log.append(f"remove {self.node}")


def _replica(
    monkeypatch: pytest.MonkeyPatch, create: Any, suspects: Suspects, states: list[int] | None = None
) -> Replica:
    monkeypatch.setattr(supervisor, "BACKOFF_SECONDS", (0.0,))
    monkeypatch.setattr(Placement, "create", create)
    monkeypatch.setattr(supervisor, "spares_beside", lambda mesh, cluster, avoided: True)
    config = Config(ModelSection("demo", str(DEMO)))
    return Replica(0, config, Router(0), suspects, lambda r: states.append(r.state) if states is not None else None)


def test_a_replica_that_keeps_failing_is_given_up_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    states: list[int] = []

    async def create(*_: object) -> Any:
        raise OSError("no Ray")

    async def play() -> Replica:
        replica = _replica(monkeypatch, create, Suspects(), states)
        life = asyncio.ensure_future(replica.run())
        while replica.state != cluster_pb2.REPLICA_STATE_GIVEN_UP:
            await asyncio.sleep(0)
        life.cancel()
        await asyncio.gather(life, return_exceptions=True)
        return replica

    replica = asyncio.run(play())
    assert states.count(cluster_pb2.REPLICA_STATE_FAILED) == GIVE_UP_FAILURES - 1
    assert replica.failures == GIVE_UP_FAILURES
    assert "no Ray" in replica.last_failure


def test_who_stands_by_takes_over_but_not_on_a_host_that_keeps_failing(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[str] = []
    suspects = Suspects()

    async def create(mesh: object, cluster: object, avoided: frozenset[str]) -> Any:
        node = "good" if "bad" in avoided else "bad"
        log.append(f"create {node}")
        return _Placement(node, log)

    async def play() -> None:
        replica = _replica(monkeypatch, create, suspects)
        life = asyncio.ensure_future(replica.run())
        while "create good" not in log:
            await asyncio.sleep(0)
        life.cancel()
        await asyncio.gather(life, return_exceptions=True)

    asyncio.run(play())
    assert log[0] == "create bad"
    assert log.count("renew bad") >= TOO_MANY - 1
    assert log[log.index("create good") - 1] == "remove bad"
    assert log[-1] == "remove good"
