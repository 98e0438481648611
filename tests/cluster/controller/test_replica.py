"""The life of a replica whose hosts are played: who is replaced by whom, and when it is given up."""

from __future__ import annotations

import asyncio
import dataclasses
import types
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

import pytest
import ray.exceptions

from cluster.config.schema import Config
from cluster.controller import replica, stalls
from cluster.controller.integrity import Canary, Digests
from cluster.controller.placement import HostError, Placement, RunningMesh
from cluster.controller.quarantine import TOO_MANY, Quarantine
from cluster.controller.rank_specs import rank_specs
from cluster.controller.replica import GIVE_UP_FAILURES, HOSTS_SECONDS, Replica
from cluster.controller.standbys import Standbys
from cluster.leader_stream import LeaderAddress
from cluster.network import REAL
from grok.serving.v1 import cluster_pb2
from tests.conftest import DEMO
from workers.host.streams import LinkError
from workers.messages.specs import LOADING, READY, Assignment, Endpoint, MeshSpec, ModelSpec, Progress


class _Host:
    """A worker on a node whose calls do what the node's kind says: `dead` ones fail, also when asked how they are; on `sick`
    ones forming a mesh raises; on `stuck` ones it never ends, nor on `cut` ones, which reach each other at first only; others
    form it, and serve for ever."""

    def __init__(self, node: str) -> None:
        self._node = node
        self.endpoint = self._method(lambda: _done(Endpoint("127.0.0.1", 1, node, 1, 2, 3, "same")))
        self.unreachable = self._method(lambda: _done(self._unreachable()))
        self._looked = False
        phase = LOADING if node.startswith("stuck") else "compiled"
        self.progress = self._method(lambda: _done(Progress(phase, 0.5)))
        self.form = self._method(self._form)
        self.warm_up = self._method(lambda: _done(None))
        self.serve = self._method(_never)
        self.dump_stacks = self._method(lambda: _done(None))

    def _method(self, call: Callable[[], asyncio.Future[Any]]) -> Any:
        dead = self._node.startswith("dead")
        return types.SimpleNamespace(remote=lambda *_: _failed(OSError("the worker is gone")) if dead else call())

    def _form(self) -> asyncio.Future[Any]:
        if self._node.startswith("sick"):
            return _failed(ray.exceptions.RayTaskError("form", "the device is broken", ValueError("broken")))
        return _never() if self._node.startswith(("stuck", "cut")) else _done({})

    def _unreachable(self) -> list[int]:
        before, self._looked = self._looked, True
        return [1 - int(self._node[-1])] if before and self._node.startswith("cut") else []


def _never() -> asyncio.Future[Any]:
    return asyncio.get_running_loop().create_future()


def _done(result: object) -> asyncio.Future[Any]:
    future = _never()
    future.set_result(result)
    return future


def _failed(error: Exception) -> asyncio.Future[Any]:
    future = _never()
    future.set_exception(error)
    future.exception()  # whether anybody asks or not
    return future


class _Placement(Placement):
    """Workers on `nodes`, beside which others stand by."""

    def __init__(self, nodes: list[str], log: list[str]) -> None:
        self.nodes, self.name = nodes, "group"
        self.hosts = [_Host(node) for node in nodes]
        self._endpoints, self._reached = [], None
        self._standbys = Standbys(_Host, lambda _: None)
        self._network = REAL
        self._log = log

    async def renew(self) -> _Placement | None:
        self._log.append(f"renew {' '.join(self.nodes)}")
        return _Placement(self.nodes, self._log)

    def remove(self) -> None:
        self._log.append(f"remove {' '.join(self.nodes)}")


class _Placements:
    """Other nodes are always there."""

    def __init__(self, create: Callable[..., Coroutine[Any, Any, Any]]) -> None:
        """`create` gets what is to be avoided, and as keywords the mesh and how long it may take."""
        self._create = create

    async def running(self) -> tuple[list[RunningMesh], dict[int, int]]:
        return [], {}

    async def begins(self, replica: int, epoch: int) -> None:
        pass

    async def create(
        self, replica: int, mesh: MeshSpec, avoided: tuple[str, ...], before: Sequence[str], seconds: float | None
    ) -> Placement | None:
        del replica, before
        placement: Placement | None = await self._create(avoided, mesh=mesh, seconds=seconds)
        return placement

    async def spares_beside(self, mesh: MeshSpec, avoided: frozenset[str]) -> bool:
        del mesh, avoided
        return True

    async def stand_by(self, placement: Placement, config: Config) -> None:
        raise AssertionError(f"a mesh on {placement.nodes} serves {config}")

    def close(self) -> None:
        pass

    async def room(self, replica: int, mesh: MeshSpec, nodes: Sequence[str]) -> None:
        raise AssertionError(f"replica {replica} has all hosts of {mesh}: {nodes}")


def _life(monkeypatch: pytest.MonkeyPatch, nodes: list[str], spare: str, until: str) -> list[str]:
    """What is placed where until a line of the log begins so: on `nodes`, with the spare one for one that is to be avoided."""
    log: list[str] = []

    async def create(avoided: tuple[str, ...], **_: Any) -> Any:
        chosen = [spare if node in avoided[:1] else node for node in nodes]
        log.append(f"create {' '.join(chosen)}")
        return _Placement(chosen, log)

    async def play() -> None:
        replica = _replica(monkeypatch, create, Quarantine())
        life = asyncio.ensure_future(replica.run())
        while not any(line.startswith(until) for line in log):
            await asyncio.sleep(0.001)
        life.cancel()
        await asyncio.gather(life, return_exceptions=True)

    asyncio.run(asyncio.wait_for(play(), 10))
    return log


def _replica(
    monkeypatch: pytest.MonkeyPatch, create: Any, quarantine: Quarantine, states: list[int] | None = None
) -> Replica:
    monkeypatch.setattr(replica, "BACKOFF_SECONDS", (0.0,))
    config = Config(ModelSpec("demo", str(DEMO)))

    def note(replica: Replica) -> None:
        if states is not None:
            states.append(replica.state)

    return Replica(0, [config], _Placements(create), quarantine, Digests({}), Canary(), note)


@pytest.mark.parametrize("epoch", [0, 3])
def test_only_a_replica_that_has_served_goes_on_with_fewer_hosts(epoch: int) -> None:
    whole = Config(ModelSpec("demo", str(DEMO)), mesh=MeshSpec(hosts=3, model=3))
    smaller = [dataclasses.replace(whole, mesh=MeshSpec(hosts=hosts, model=hosts)) for hosts in (2, 1)]
    asked: list[tuple[int, float | None]] = []

    async def create(avoided: tuple[str, ...], mesh: MeshSpec, seconds: float | None) -> Any:
        del avoided
        asked.append((mesh.hosts, seconds))
        if mesh.hosts == 1:
            return _Placement(["stuck"], [])
        return None if seconds is not None else await _never()

    async def play() -> Replica:
        replica = Replica(
            0, [whole, *smaller], _Placements(create), Quarantine(), Digests({}), Canary(), lambda _: None, epoch
        )
        life = asyncio.ensure_future(replica.run())
        async with asyncio.timeout(10):
            while not (replica.hosts if epoch else asked):
                await asyncio.sleep(0)
        life.cancel()
        await asyncio.gather(life, return_exceptions=True)
        return replica

    view = asyncio.run(play()).view
    assert asked == ([(hosts, HOSTS_SECONDS) for hosts in (3, 2, 1)] if epoch else [(3, None)])
    assert view.mesh.hosts == (1 if epoch else 3)


async def _no_more(*_: object, **__: object) -> Any:
    raise AssertionError("no other workers are needed")


def test_a_mesh_that_goes_on_has_its_leader_before_the_new_controller_has_asked_it() -> None:
    config = Config(ModelSpec("demo", str(DEMO)))
    endpoint = Endpoint("127.0.0.1", 1, "good", 1, 2, 3, "same")
    (spec,) = rank_specs(config, "group", 0, 7, [endpoint], ())
    running = RunningMesh(_Placement(["good"], []), (Assignment(endpoint, spec, {}, READY),))
    replica = Replica(
        0, [config], _Placements(_no_more), Quarantine(), Digests({}), Canary(), lambda _: None, 7, running
    )
    assert replica.view.leader == LeaderAddress(0, 7, spec.leader, spec.secret, spec.liveness)


def test_a_replica_that_keeps_failing_is_given_up_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    states: list[int] = []

    async def create(*_: object, **__: object) -> Any:
        raise OSError("no Ray")

    async def play() -> Replica:
        replica = _replica(monkeypatch, create, Quarantine(), states)
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
    log = _life(monkeypatch, ["dead"], "good", until="create good")
    assert log[:-1] == ["create dead", *["renew dead"] * (TOO_MANY - 1), "remove dead", "create good"]
    assert log[-1] == "remove good"


@pytest.mark.parametrize("kind", ["sick", "stuck"])
def test_a_host_that_raises_or_hangs_is_left_for_a_spare_one(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    monkeypatch.setattr(stalls, "STALLED_SECONDS", {LOADING: 0.02})
    monkeypatch.setattr(replica, "POLL_SECONDS", 0.005)
    log = _life(monkeypatch, ["good0", kind], "good2", until="create good0 good2")
    assert sum(line.startswith(("create", "renew")) for line in log) <= TOO_MANY + 1
    if kind == "sick":
        assert log[:4] == ["create good0 sick", "renew good0 sick", "remove good0 sick", "create good0 good2"]


def test_hosts_that_lose_each_other_while_they_form_a_mesh_are_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replica, "QUIET_SECONDS", 0.02)
    monkeypatch.setattr(replica, "POLL_SECONDS", 0.005)
    log = _life(monkeypatch, ["cut0", "cut1"], "good", until="renew cut0 cut1")
    assert log[:2] == ["create cut0 cut1", "renew cut0 cut1"]


def test_a_failure_of_which_nobody_can_be_blamed_is_tried_on_other_hosts_in_the_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def ask(self: _Placement, method: str, *each: object, seconds: float | None = None) -> Any:
        if method == "serve" and "bad" in self.nodes:
            raise HostError(0, LinkError("plan 7 has been running for 9 s; a rank must hang"))
        return await Placement.ask(self, method, *each, seconds=seconds)  # type: ignore[arg-type]

    monkeypatch.setattr(_Placement, "ask", ask)
    log = _life(monkeypatch, ["good", "bad"], "spare", until="create good spare")
    assert len(log) < 2 * GIVE_UP_FAILURES * 2


def test_whatever_the_search_for_who_is_to_blame_raises_the_replica_is_built_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def silent(self: _Placement) -> list[int]:
        raise RuntimeError("Ray says no")

    monkeypatch.setattr(_Placement, "silent", silent)
    log: list[str] = []

    async def create(*_: object, **__: object) -> Any:
        log.append("create")
        return _Placement(["sick"], log)

    async def play() -> None:
        life = asyncio.ensure_future(_replica(monkeypatch, create, Quarantine()).run())
        while log.count("renew sick") < 3:
            await asyncio.sleep(0)
        life.cancel()
        await asyncio.gather(life, return_exceptions=True)

    asyncio.run(asyncio.wait_for(play(), 10))


@pytest.mark.parametrize(
    ("nodes", "blamed"),
    [(["good", "dead"], [1]), (["dead", "dead"], [0, 1]), (["dead", "silent"], [1]), (["good", "good"], [])],
)
def test_who_died_of_a_lost_host_is_not_blamed(
    monkeypatch: pytest.MonkeyPatch, nodes: list[str], blamed: list[int]
) -> None:
    monkeypatch.setattr("cluster.controller.placement.BRIEF_SECONDS", 0.05)

    async def why_lost(*_: object) -> str:
        return "no process of its host answers"

    async def play() -> list[int]:
        placement = _Placement(nodes, [])
        network: Any = types.SimpleNamespace(why_lost=why_lost)
        placement._network = network
        for host, node in zip(placement.hosts, nodes, strict=True):
            if node == "silent":
                host.progress = types.SimpleNamespace(remote=_never)
        return await placement.silent()

    assert asyncio.run(play()) == blamed


def _reached(missed: list[list[int]]) -> HostError | None:
    """What a placement says of hosts that miss each other."""

    async def play() -> None:
        placement = _Placement([f"good{i}" for i in range(len(missed))], [])
        for host, others in zip(placement.hosts, missed, strict=True):
            host.unreachable = types.SimpleNamespace(remote=lambda places, others=others: _done(others))
        await placement.check_reachable(await placement.endpoints(None))

    try:
        asyncio.run(play())
    except HostError as error:
        return error
    return None


def test_of_hosts_that_can_not_reach_each_other_the_one_that_more_miss_is_blamed() -> None:
    assert _reached([[], [], []]) is None
    one = _reached([[1], [0, 2], [1]])
    assert one is not None
    assert one.rank == 1
    assert "host 0, 2 can't reach each other" in str(one)
    with pytest.raises(OSError, match=r"host \d and host \d can't reach each other"):
        _reached([[], [], [0]])  # either may be to blame


def test_hosts_that_run_other_code_form_no_mesh() -> None:
    async def play() -> None:
        placement = _Placement(["good0", "good1"], [])
        other = Endpoint("10.0.0.2", 1, "good1", 1, 2, 3, "old")
        placement.hosts[1].endpoint = types.SimpleNamespace(remote=lambda *_: _done(other))
        await placement.endpoints(None)

    with pytest.raises(HostError, match="host 1: it runs other code than host 0: old and same; install the same"):
        asyncio.run(play())
