"""One seed: a service, its clients, what goes wrong, and what must hold in the end."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import logging
import random
import secrets
import signal
import time
import traceback
from collections.abc import Collection, Iterator, Sequence
from typing import Any
from unittest import mock

from cluster.config.schema import AutoscalingSection, ClusterSection, Config, GatewaySection
from cluster.telemetry.metrics import SESSIONS_RESUMED
from tests.conftest import DEMO
from tests.simulation.clients import TOGETHER, Clients, Report
from tests.simulation.devices import BREAKING, NO_NUMBERS
from tests.simulation.loop import BEGIN, VirtualLoop
from tests.simulation.placements import Cluster
from tests.simulation.service import Controllers, SimGateway
from tests.simulation.workers import CONTEXT, UNUSED, Conditions, SimWorker, workers_of
from tests.simulation.world import SimProcess, World
from workers.host import leader as leader_module
from workers.messages.specs import EngineSpec, MeshSpec, ModelSpec

FAULTS = (
    "kill leader", "kill follower", "stop leader", "stop follower", "power off", "cut off", "cut pair", "sick host",
    "slow steps", "step raises", "step hangs", "streams break", "restart replica",
    "breaking request", "request without numbers", "flood",
    "kill controller", "kill gateway", "kill all gateways", "kill controller and a worker",
    "pause leader", "pause follower", "pause briefly", "pause gateway", "pause controller",
)  # fmt: skip
#: What costs no mesh.
HARMLESS = (
    "pause briefly", "pause gateway", "pause controller", "kill controller", "kill gateway", "kill all gateways",
    "streams break", "flood",
)  # fmt: skip
#: What may also strike a mesh that is being built.
BUILDING = (
    "kill leader", "kill follower", "stop leader", "stop follower", "power off", "cut off", "sick host",
    "pause leader", "pause follower",
)  # fmt: skip
#: What stays broken.
LASTING = ("cut pair", "sick host")
#: What moves no session.
UNNOTICED = ("kill controller", "pause controller", "flood")
#: Virtual seconds that a request waits for a replica, and in which all must be well again.
FAILOVER_SECONDS, RECOVERY_SECONDS = 120.0, 200.0
#: Virtual seconds that a stream may take if one thing goes wrong once: the mesh may shrink, and grow again, meanwhile.
ONCE_SECONDS = 60.0
#: Virtual seconds in which a request is forgotten whose client has left: its gateway may have died with it.
LEFT_SECONDS = 0.5
#: Seconds of the processor that a seed may take, and of the clock, in case that it waits for something real.
CPU_SECONDS, WAITING_SECONDS = 20, 300


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a seed came to: `problem` is empty if all held; `parts` were played: clients and strikes."""

    seed: int
    problem: str
    digest: str
    seconds: float
    notes: tuple[str, ...]
    report: Report
    parts: tuple[str, ...]


class _Play:
    def __init__(self, seed: int, kinds: Sequence[str], without: Collection[str]) -> None:
        rng = random.Random(seed)
        hosts, self._replicas = rng.choice((1, 2, 2, 3)), rng.choice((1, 1, 2))
        self._shrinks = seed % 4 == 1 and hosts > 1
        # Some kinds again and again are worse than one of each. Each is the first one of some seed among any few.
        self._kinds = rng.sample(list(kinds), min(len(kinds), rng.randint(1, 4)))
        if kinds:
            self._kinds[0] = kinds[(seed + seed // len(kinds)) % len(kinds)]
        if self._shrinks and seed % 8 == 1 and "power off" in kinds:
            self._kinds[0] = "power off"
        if self._kinds and self._kinds[0] in LASTING:
            hosts, self._shrinks = max(hosts, 2), False
        # Some seeds must lose no mesh.
        if seed % 5 == 2 and "pause briefly" in kinds:
            self._kinds = ["pause briefly", *(kind for kind in self._kinds if kind in HARMLESS)]
        spares = rng.choice((1, 2))
        self.world = World(seed, hosts * self._replicas + (0 if self._shrinks else spares))
        # A leader of the release before does not say which request it computes alone.
        earlier = seed % 7 == 3 and "breaking request" not in self._kinds
        self._conditions = Conditions(batch_invariant=rng.random() < 0.6, earlier=earlier)
        self._cluster = Cluster(self.world, self._conditions)
        scaling = AutoscalingSection()
        if seed % 3 == 0:  # replicas come and go while they break
            scaling = AutoscalingSection(self._replicas + 1, queue_per_replica=0.5, up_seconds=0.5, down_seconds=3)
        config = Config(
            ModelSpec("demo", str(DEMO)),
            ClusterSection("auto"),
            self._replicas,
            scaling,
            MeshSpec("cpu", hosts, 1, 1, hosts),
            EngineSpec(
                slots=rng.choice((2, 4, 8)),
                page_size=4,
                prefill_chunk=8,
                context=CONTEXT,
                kv_pages=CONTEXT // 4 + 1 + rng.choice((0, 20, 200)),
                steps_per_plan=rng.choice((1, 1, 3)),
            ),
            GatewaySection(drain_seconds=2.0, failover_seconds=FAILOVER_SECONDS),
        )
        self._config = config
        smaller = [
            dataclasses.replace(config, mesh=dataclasses.replace(config.mesh, hosts=fewer, model=fewer))
            for fewer in range(hosts - 1, 0, -1)
            if self._shrinks
        ]
        self._controllers = Controllers(self._cluster, [config, *smaller])
        count = rng.choice((1, 2, 2, 3))
        self._gateways = [self._gateway(f"gateway-{i}") for i in range(count)]
        self.clients = Clients(self.world, self._gateways, self._left, scoring=not earlier)
        clients = {f"client {i}": rng.getrandbits(32) for i in range(rng.randint(4, 24))}
        count = 0 if not self._kinds else 1 if self._kinds[0] in LASTING else rng.choice((1, 1, 2, 3, 4))
        strikes = {f"strike {i}": rng.getrandbits(32) for i in range(count)}
        self._streams = {name: part for name, part in clients.items() if name not in without}
        self._strikes = {name: part for name, part in strikes.items() if name not in without}
        self._beside: list[asyncio.Future[Any]] = []
        #: When gateways' streams last broke.
        self._broken = 0.0
        self._moved = _sessions_moved()

    async def run(self) -> None:
        await self._until_well(60)
        running = [asyncio.ensure_future(self.clients.one(*client)) for client in self._streams.items()]
        breaking = asyncio.ensure_future(self._break())
        try:
            async with asyncio.timeout(400):
                await asyncio.gather(*running, breaking)
            self._mend()
            async with asyncio.timeout(400):
                await asyncio.gather(*self._beside)
            await self._until_well(RECOVERY_SECONDS)
            await asyncio.sleep(1)
            self._check()
        finally:
            for task in (*running, breaking, *self._beside):
                task.cancel()
            await asyncio.gather(*running, breaking, *self._beside, return_exceptions=True)
        await self._end()
        assert not self.world.defects, self.world.defects[0]

    def _gateway(self, name: str) -> SimGateway:
        return SimGateway(self.world, self._controllers, self._config, name)

    async def _until_well(self, seconds: float) -> None:
        """Returns once all replicas serve, all gateways know, the controller knows them, and no step hangs: it may be of a kind
        of which it is not known how long it takes."""
        async with asyncio.timeout(seconds):
            while not self._well():
                await asyncio.sleep(0.25)

    def _well(self) -> bool:
        known = {report.pid for report in self._controllers.controller.reports}
        return (
            self._controllers.process.runs
            and all(
                gateway.process.runs and gateway.router.ready >= self._replicas and gateway.process.pid in known
                for gateway in self._gateways
            )
            and all(view.mesh == self._config.mesh for view in self._controllers.controller._fleet.view().replicas)
            and not any(leader.hung for leader in self._conditions.leaders if leader.runs)
        )

    @property
    def parts(self) -> tuple[str, ...]:
        return *self._strikes, *self._streams

    async def _break(self) -> None:
        for name, strike in self._strikes.items():
            rng = random.Random(strike)
            await asyncio.sleep(rng.choice((0, TOGETHER[0])) + rng.uniform(0.2, 4))
            self._strike(self._kinds[0] if name == "strike 0" else rng.choice(self._kinds), rng)

    def _strike(self, kind: str, rng: random.Random) -> None:
        world = self.world
        leaders = [leader for leader in self._conditions.leaders if leader.runs]
        if "request" in kind:
            world.note(kind)
            odd = (BREAKING, "REPLICAS_LOST") if "breaking" in kind else (NO_NUMBERS, "COMPLETION_FAILED")
            for _ in range(rng.randint(1, 3)):
                self._beside.append(asyncio.ensure_future(self.clients.odd(*odd, rng.uniform(0, 4))))
            return
        if kind == "flood":
            world.note(kind)
            disturbed = any("controller" in other or "gateway" in other for other in self._kinds)
            self._beside.append(asyncio.ensure_future(self.clients.flood(rng.getrandbits(32), counts=not disturbed)))
            return
        if "controller" in kind or "gateway" in kind:
            world.note(kind)
            self._strike_front(kind, rng)
            if "worker" not in kind:
                return
        if not leaders:
            return
        members = rng.choice(leaders).worker.members
        if kind in BUILDING and rng.random() < 0.5:  # it strikes the mesh that is built next
            self._conditions.during[rng.choice(("form", "warm_up", "serve", "serve"))] = functools.partial(
                self._hit, kind, rng
            )
            kind = "kill leader"
        self._hit(kind, rng, members)

    def _hit(self, kind: str, rng: random.Random, members: dict[int, SimWorker]) -> None:
        """Strikes a mesh."""
        world, mended = self.world, rng.uniform(1, 40 if self._shrinks else 20)
        process = members.get(1 if "follower" in kind else rng.choice(sorted(members)), members[0]).process
        node = process.node
        world.note(f"{kind}: {node.address}")
        if kind.startswith("kill"):
            process.die()
        elif kind.startswith("stop"):
            process.stop()
        elif kind == "pause briefly":
            for i in range(4):
                stopped = members[rng.choice(sorted(members))].process
                world.loop.call_later(2 * i, self._pause, stopped, rng.uniform(0.5, 1.4))
        elif kind.startswith("pause"):
            process.stop(rng.uniform(0.2, 6))
        elif kind == "power off":
            node.power_off()
            world.loop.call_later(mended, setattr, node, "on", True)
        elif kind == "cut off":
            node.alone = True
            world.loop.call_later(mended, setattr, node, "alone", False)
        elif kind in LASTING and not self._spares():
            world.note("not done: no host is left to take its place")
        elif kind == "cut pair" and len(members) > 1:
            world.cut.add(frozenset(member.process.node.address for _, member in sorted(members.items())[:2]))
        elif kind == "sick host":
            node.sick = True
            process.die()
        elif kind == "slow steps":
            self._conditions.slow = rng.uniform(0.1, 0.9)
            world.loop.call_later(mended / 4, setattr, self._conditions, "slow", 0.0)
        elif kind == "step raises":
            self._conditions.raises = True
        elif kind == "step hangs":
            self._conditions.hangs = True
        elif kind == "streams break":
            self._broken = world.loop.time()
            for end in rng.choice(self._gateways).process.ends:
                end.close()
        elif kind == "restart replica":
            self._beside.append(asyncio.ensure_future(self._restart(rng)))

    def _pause(self, process: SimProcess, seconds: float) -> None:
        if process.runs:
            process.stop(seconds)

    def _spares(self) -> int:
        """Hosts that could be broken for good, and there would still be enough."""
        broken = sum(node.sick for node in self.world.hosts) + len(self.world.cut)
        return len(self.world.hosts) - self._replicas * self._config.mesh.hosts - broken

    def _left(self, request_id: str) -> None:
        """Soon after its client has left nothing knows a request any more."""

        def look() -> None:
            if self.world.loop.time() < max(self.world.stopped_until, self._broken) + LEFT_SECONDS:
                return
            for leader in self._conditions.leaders:
                if not (
                    leader.runs and leader.computes and self.world.reaches(self.world.front, leader.worker.process.node)
                ):
                    continue
                if request_id in leader.leader._owners or request_id in dict(leader.scheduler.ahead()):
                    self.world.defects.append("a request goes on whose client has left")
                if not all(owner.open for owner in leader.leader._owners.values()):
                    self.world.defects.append("a request goes on whose gateway has died")

        self.world.loop.call_later(LEFT_SECONDS, look)

    def _strike_front(self, kind: str, rng: random.Random) -> None:
        controller = self._controllers.process
        if kind.startswith("pause"):
            (controller if "controller" in kind else rng.choice(self._gateways).process).stop(rng.uniform(0.2, 6))
            return
        if "controller" in kind:
            if controller.runs:
                self._controllers.kill()
            return
        chosen = self._gateways if kind == "kill all gateways" else [rng.choice(self._gateways)]
        for gateway in list(chosen):
            if gateway.process.runs:
                self._broken = self.world.loop.time()
                gateway.die()
                self.world.loop.call_later(rng.uniform(0.5, 3), self._start_again, gateway)
                self._left("")

    def _start_again(self, gateway: SimGateway) -> None:
        self._gateways[self._gateways.index(gateway)] = self._gateway(gateway.name)

    async def _restart(self, rng: random.Random) -> None:
        with contextlib.suppress(Exception):  # it may not serve just now, or fail meanwhile
            operator = self._controllers.client(SimProcess(self.world.front))
            await operator.restart(rng.randrange(self._replicas))

    def _mend(self) -> None:
        """Hosts come back; what is broken for good stays so, and there is one host too many."""
        for node in self.world.hosts:
            node.on, node.alone = True, False
        self._conditions.during.clear()
        self._conditions.slow, self._conditions.raises, self._conditions.hangs = 0.0, False, False

    def _check(self) -> None:
        for gateway in self._gateways:
            assert gateway.admission.in_flight == 0, (
                f"{gateway.admission.in_flight} places of a gateway are still taken"
            )
            assert gateway.router.sessions == 0, f"{gateway.router.sessions} sessions are left"
        for leader in (leader for leader in self._conditions.leaders if leader.runs):
            load = leader.scheduler.load
            leader.scheduler.check_integrity()
            assert load.waiting == 0, f"requests are left on the engine: {load}"
            assert load.running <= 1, f"requests are left on the engine: {load}"  # a canary may be
            assert not leader.leader._owners, "a leader remembers requests that are over"
            assert not leader.leader._waits, "a leader remembers requests that are over"
        serving = [(leader.spec.replica, leader.spec.epoch) for leader in self._conditions.leaders if leader.runs]
        assert len(serving) == len(set(serving)), f"an epoch has two leaders: {serving}"
        if set(self._kinds) <= set(HARMLESS) and not self._config.autoscaling.max_replicas:
            assert len(self._conditions.meshes) == self._replicas, "a mesh was lost for nothing"
        if set(self._kinds) <= set(UNNOTICED) and not self._config.autoscaling.max_replicas:
            assert _sessions_moved() == self._moved, "sessions were moved for nothing"
        if len(self._strikes) == 1 and "breaking request" not in self._kinds:
            longest = self.clients.report.longest
            assert longest <= ONCE_SECONDS, f"a stream has taken {longest:.0f} s, and one thing went wrong"
        epochs = [mesh[:2] for mesh in self._conditions.meshes]
        assert len(epochs) == len(set(epochs)), f"two meshes have the same epoch: {epochs}"

    async def _end(self) -> None:
        """An orderly end leaves nothing."""
        for gateway in self._gateways:
            gateway.die()
        await self._controllers.end()
        await asyncio.sleep(5)
        left = workers_of(self.world)
        assert not left, f"{len(left)} workers are left"
        assert all(node.free for node in self.world.hosts), "hosts are still taken"
        self._controllers.process.die()


def _sessions_moved() -> float:
    """In this process so far."""
    return next(sample.value for metric in SESSIONS_RESUMED.collect() for sample in metric.samples)


def shrink(seed: int, kinds: Sequence[str] = FAULTS) -> Outcome:
    """A seed after which not all held, with as few clients and strikes as leave a problem."""
    outcome, without = play(seed, kinds), set[str]()
    for part in outcome.parts if outcome.problem else ():
        smaller = play(seed, kinds, {*without, part})
        if smaller.problem:
            outcome = smaller
            without.add(part)
    return outcome


def play(seed: int, kinds: Sequence[str] = FAULTS, without: Collection[str] = ()) -> Outcome:
    """Plays a seed with faults of these kinds, but for some parts."""
    loop = VirtualLoop()
    asyncio.set_event_loop(loop)
    plays: list[_Play] = []
    problem = ""

    async def run() -> None:
        plays.append(_Play(seed, kinds, without))
        await plays[0].run()

    with _virtual(loop):
        try:
            loop.run_until_complete(run())
        except Exception as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            problem = f"{type(error).__name__}: {error} ({where.name}:{where.lineno})"
        finally:
            for task in asyncio.all_tasks(loop):
                task.cancel()
            with contextlib.suppress(Exception):
                loop.run_until_complete(asyncio.sleep(0.1))
    seconds = loop.now - BEGIN
    loop.close()
    asyncio.set_event_loop(None)
    if not plays:
        return Outcome(seed, problem, "", seconds, (), Report(), ())
    world, report = plays[0].world, plays[0].clients.report
    problem = problem or "; ".join(report.errors[:3])
    return Outcome(seed, problem, world.digest, seconds, tuple(world.notes), report, plays[0].parts)


@contextlib.contextmanager
def _virtual(loop: VirtualLoop) -> Iterator[None]:
    """Clocks show the loop's time; what takes too long is ended."""

    def late(*_: Any) -> None:
        raise TimeoutError(f"{CPU_SECONDS} seconds of the processor, or {WAITING_SECONDS} of the clock, without an end")

    names = random.Random(0)
    before = [signal.signal(sign, late) for sign in (signal.SIGPROF, signal.SIGALRM)]
    signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
    signal.alarm(WAITING_SECONDS)
    logging.disable(logging.CRITICAL)
    try:
        with (
            mock.patch.object(time, "monotonic", loop.time),
            mock.patch.object(time, "perf_counter", loop.time),
            mock.patch.object(leader_module, "faulthandler", UNUSED),
            mock.patch.object(secrets, "token_hex", lambda size: names.randbytes(size).hex()),
            mock.patch.object(secrets, "token_bytes", names.randbytes),
        ):
            yield
    finally:
        logging.disable(logging.NOTSET)
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.alarm(0)
        for sign, handler in zip((signal.SIGPROF, signal.SIGALRM), before, strict=True):
            signal.signal(sign, handler)
