"""Workers: their calls are played, their leader is the project's own, on played devices."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
from collections.abc import Callable
from typing import Any

import ray.exceptions

from tests.simulation.devices import SimDevices
from tests.simulation.world import DeadError, End, SimNetwork, SimNode, SimProcess, World, call
from tests.workers.messages import frozen_protocol_1
from workers.engine.scheduler import Scheduler
from workers.host.leader import NOTHING, Leader, StepWait
from workers.host.streams import LATE_SECONDS, LENGTH, PULSE_SECONDS, LinkError
from workers.host.watchdog import CHECK_SECONDS
from workers.messages.codec import decode, encode
from workers.messages.frames import Done, Hello, LeaderInput, LeaderOutput, PlanFrame
from workers.messages.plan import EngineShape, Plan
from workers.messages.specs import LOADING, READY, WARMING_UP, Assignment, Endpoint, Progress, RankSpec
from workers.telemetry.stalls import StallWatch

#: Of the model that all serve.
CONTEXT, VOCAB_SIZE = 160, 4096


_CALLS = (
    "endpoint", "unreachable", "prepare", "replace", "form", "warm_up", "serve", "progress", "assignment",
)  # fmt: skip


class _Unused:
    """Whatever is asked of it, nothing comes of it."""

    def __getattr__(self, name: str) -> _Unused:
        return self

    def __call__(self, *_: object, **__: object) -> _Unused:
        return self


UNUSED: Any = _Unused()


class Conditions:
    """What the devices of all meshes are like: whether kernels are batch-invariant, seconds that steps take longer, whether the
    next step raises, or never ends; whether leaders are of an earlier release than gateways; and what happens to a mesh when a
    worker is next asked to do something."""

    def __init__(self, *, batch_invariant: bool, earlier: bool = False) -> None:
        self.batch_invariant, self.earlier = batch_invariant, earlier
        self.slow, self.raises, self.hangs = 0.0, False, False
        self.during: dict[str, Callable[[dict[int, SimWorker]], None]] = {}
        #: The workers of each epoch, by replica, epoch and secret.
        self.meshes: dict[tuple[int, int, bytes], dict[int, SimWorker]] = {}
        self.leaders: list[SimLeader] = []


class SimHost:
    """What a Ray handle of a worker is to its controller."""

    def __init__(self, caller: SimProcess, worker: SimWorker) -> None:
        self.worker = worker
        for name in _CALLS:
            setattr(self, name, _Method(_Remote(caller, worker, name)))
        self.dump_stacks = UNUSED


@dataclasses.dataclass(frozen=True)
class _Method:
    remote: Callable[..., Any]


class _Remote:
    def __init__(self, caller: SimProcess, worker: SimWorker, name: str) -> None:
        self._caller, self._worker, self._name = caller, worker, name

    def __call__(self, *arguments: Any) -> asyncio.Task[Any]:
        async def made() -> Any:
            try:
                method = getattr(self._worker, self._name)
                return await call(self._caller, self._worker.process, method, arguments)
            except DeadError as error:
                raise ray.exceptions.RayActorError(error_msg=str(error)) from error
            except Exception as error:
                cause: Any = error
                raise ray.exceptions.RayTaskError(self._name, str(error), cause) from error

        return asyncio.ensure_future(made())


class SimWorker:
    """The worker of a host."""

    def __init__(self, node: SimNode, conditions: Conditions) -> None:
        self.process = SimProcess(node)
        self.world, self.conditions = node.world, conditions
        self.spec: RankSpec | None = None
        self._prepared = False
        self._phase = "starting"
        self._failure: Exception | None = None
        self._leader: SimLeader | None = None
        self._serving = False
        self._reached: set[str] = set()
        self._port = next(node.world.numbers)

    async def endpoint(self, weights_cache: str | None) -> Endpoint:
        del weights_cache
        await asyncio.sleep(self.world.rng.uniform(0.1, 1.0))
        return self._endpoint

    @property
    def _endpoint(self) -> Endpoint:
        node, pid = self.process.node, self.process.pid
        return Endpoint(node.address, pid, node.id, self._port, self._port, 1, "same", f"{node.address}:{pid}")

    async def unreachable(self, places: list[tuple[str, int]]) -> list[int]:
        here = self.process.node
        return [i for i, (address, _) in enumerate(places) if not self.world.reaches(here, self.world.node(address))]

    async def prepare(self, *_: Any) -> None:
        if not self._prepared:
            await asyncio.sleep(self.world.rng.uniform(1, 3))
            self._prepared = True

    async def replace(self, before: Endpoint | None) -> None:
        if before is not None:
            self.world.processes[before.pid].die()
        await asyncio.sleep(0.02)

    async def progress(self) -> Progress:
        failure = self._failure or (self._leader.server.broken if self._leader and self._leader.server.closed else None)
        if failure is not None:
            raise failure
        return Progress(self._phase, 0.5)

    async def assignment(self) -> Assignment:
        return Assignment(self._endpoint, self.spec, {}, (await self.progress()).phase)

    async def form(self, spec: RankSpec) -> dict[str, int]:
        self.spec, self._phase = spec, LOADING
        self.members[spec.rank] = self
        self._asked("form")
        if self.process.node.sick:
            await asyncio.sleep(0.3)
            raise RuntimeError("XlaRuntimeError: uncorrectable ECC error")
        if spec.rank == 0:
            self._leader = SimLeader(self, spec)
        await asyncio.sleep(self.world.rng.uniform(0.2, 0.6) if self._prepared else self.world.rng.uniform(1, 4))
        await self._meet("formed")
        return {}

    async def warm_up(self) -> None:
        self._phase = WARMING_UP
        self._asked("warm_up")
        await self._meet("warm")
        self._phase = READY

    async def serve(self) -> None:
        self._asked("serve")
        await asyncio.sleep(self.world.rng.uniform(0, 2))  # as Ray may, where much is to be done
        if not self._serving:
            self._serving = True
            self.process.spawn(self._serve())

    def _asked(self, method: str) -> None:
        if (happens := self.conditions.during.pop(method, None)) is not None:
            happens(self.members)

    async def _serve(self) -> None:
        assert self.spec is not None
        try:
            await (self._follow(self.spec) if self._leader is None else self._leader.run())
        except Exception as error:
            if not isinstance(error, OSError) and "XlaRuntimeError" not in str(error):
                self.world.defects.append(f"rank {self.spec.rank} died of {error!r}")
            self._failure = error

    @property
    def members(self) -> dict[int, SimWorker]:
        """Of its mesh, by rank."""
        assert self.spec is not None
        return self.conditions.meshes.setdefault((self.spec.replica, self.spec.epoch, self.spec.secret), {})

    def computes(self) -> bool:
        """Whether a step of the mesh can end."""
        assert self.spec is not None
        members = [self.members.get(rank) for rank in range(self.spec.mesh.hosts)]
        return all(
            one is not None
            and one.process.runs
            and all(other is not None and self.world.reaches(one.process.node, other.process.node) for other in members)
            for one in members
        )

    async def _meet(self, name: str) -> None:
        """A collective. It never ends if a member is out of reach, and in an error after some seconds if one has died."""
        self._reached.add(name)
        assert self.spec is not None
        hosts, began = self.spec.mesh.hosts, self.world.loop.time()
        while True:
            members = list(self.members.values())
            if len(members) == hosts and self.computes() and all(name in one._reached for one in members):
                return
            if any(not one.process.runs for one in members) and self.world.loop.time() - began > 10:
                raise RuntimeError("XlaRuntimeError: a task of the mesh died")
            await asyncio.sleep(0.05)

    async def _follow(self, spec: RankSpec) -> None:
        host, port = spec.leader.rsplit(":", 1)
        reader, end = await SimNetwork(self.process).connect(host, int(port))
        _send(end, Hello(spec.epoch, spec.secret, spec.rank, liveness=spec.liveness))
        self.process.spawn(_pulse(end, Done()))
        expected = 1
        with contextlib.suppress(asyncio.IncompleteReadError):
            while True:
                frame = decode(PlanFrame, await _frame(reader))
                assert (frame.epoch, frame.plan.number) == (spec.epoch, expected), "a plan is out of order"
                expected += 1
                _send(end, Done(frame.plan.number))


class SimLink:
    """The leader's end of a gateway's stream."""

    def __init__(self, end: End, earlier: bool) -> None:
        self._end, self.open, self._earlier = end, True, earlier

    def send(self, output: LeaderOutput) -> None:
        if self.open:
            _send(self._end, output, self._earlier)

    def flush(self, until: float) -> None:
        del until

    def close(self) -> None:
        self.open = False
        self._end.close()


class SimServer:
    """What the leader takes for its LeaderServer."""

    def __init__(self, process: SimProcess, spec: RankSpec, earlier: bool) -> None:
        """`earlier`: it is of an earlier release than gateways."""
        self._earlier = earlier
        self.inbox: asyncio.Queue[Any] = asyncio.Queue()
        self.followers: dict[int, End] = {}
        self._heard: dict[int, float] = {}
        self.activity = UNUSED
        self.broken = LinkError("the mesh is broken")
        self.closed = False
        self._process, self._spec = process, spec
        self._ends: list[End] = []
        process.listen(spec.leader, self._accept)

    def broadcast(self, plan: Plan) -> None:
        if self.closed:
            raise self.broken
        for end in self.followers.values():
            _send(end, PlanFrame(self._spec.epoch, plan))

    def give_up(self, reason: str, rank: int | None = None) -> None:
        if not self.closed:
            self.closed = True
            self.broken = LinkError(reason, rank)
            self.inbox.put_nowait(None)
            self._process.world.listeners.pop(self._spec.leader, None)
            for end in self._ends:
                end.close()

    def late(self) -> bool:
        now = self._process.world.loop.time()
        return any(now - heard > LATE_SECONDS for heard in self._heard.values())

    async def _accept(self, reader: asyncio.StreamReader, end: End) -> None:
        hello = decode(Hello, await _frame(reader))
        if hello.epoch != self._spec.epoch or hello.secret != self._spec.secret:
            end.close()
            return
        self._ends.append(end)
        if hello.rank is not None:
            await self._hear_follower(reader, end, hello.rank, hello.liveness)
            return
        link = SimLink(end, self._earlier)
        self.inbox.put_nowait((link, LeaderInput()))
        self._process.spawn(_pulse(end, LeaderOutput(self._spec.epoch), self._earlier))
        with contextlib.suppress(asyncio.IncompleteReadError):
            while True:
                frame = await _frame(reader)
                self.inbox.put_nowait((link, decode(LeaderInput, _as_earlier(LeaderInput, frame, self._earlier))))
        link.open = False
        self.inbox.put_nowait((link, None))

    async def _hear_follower(self, reader: asyncio.StreamReader, end: End, rank: int, liveness: str) -> None:
        loop = self._process.world.loop
        self.followers[rank], self._heard[rank] = end, loop.time()
        frame = asyncio.ensure_future(_frame(reader))
        try:
            while True:
                await asyncio.wait([frame], timeout=self._spec.silence_seconds)
                if frame.done():
                    frame.result()
                    self._heard[rank] = loop.time()
                    frame = asyncio.ensure_future(_frame(reader))
                    continue
                reason = await SimNetwork(self._process).why_lost(liveness, self._spec.silence_seconds)
                if reason is not None and not frame.done():
                    self.give_up(f"follower {rank} is lost: {reason}", rank)
                    return
        except asyncio.IncompleteReadError:
            self.give_up(f"follower {rank} has ended", rank)
        finally:
            frame.cancel()


class SimLeader:
    """The project's leader; waiting, of which its loop has none, is done here."""

    def __init__(self, worker: SimWorker, spec: RankSpec) -> None:
        engine, conditions = spec.engine, worker.conditions
        assert engine.kv_pages is not None
        shape = EngineShape(
            engine.slots,
            1,
            engine.kv_pages,
            engine.page_size,
            engine.prefill_chunk,
            CONTEXT,
            conditions.batch_invariant,
        )
        self.worker, self.spec = worker, spec
        self.server = SimServer(worker.process, spec, conditions.earlier)
        self.scheduler = Scheduler(shape, VOCAB_SIZE, engine.max_waiting, engine.steps_per_plan)
        stalls = StallWatch("the leader's loop", None, logging.warning)
        server: Any = self.server
        devices: Any = SimDevices(shape, lambda: bool(self.scheduler.trying))
        self.leader = Leader(
            devices, self.scheduler, server, spec.epoch, lambda: 0, UNUSED, UNUSED, stalls, engine.prefill_slowdown
        )
        self._stepped, self.hung = 0.0, False
        conditions.leaders.append(self)

    @property
    def runs(self) -> bool:
        return self.worker.process.runs and not self.server.closed

    @property
    def computes(self) -> bool:
        """Whether it computes as fast as ever."""
        return self.worker.computes() and self.worker.world.loop.time() - self._stepped < 0.1

    async def run(self) -> None:
        try:
            async with asyncio.timeout(60):
                while len(self.server.followers) < self.spec.mesh.hosts - 1:
                    await asyncio.sleep(0.01)
            self.worker.process.spawn(self._watch())
            turns = self.leader.turns()
            wait = next(turns)
            while True:
                if isinstance(wait, StepWait):
                    await self._step()
                    pending: Any = wait.pending
                    wait = turns.send(pending.tokens)
                else:
                    wait = turns.send(await self._next(wait.seconds))
        finally:
            self.server.give_up("the leader has ended")

    async def _next(self, seconds: float) -> Any:
        try:
            if not seconds:
                return self.server.inbox.get_nowait()
            return await asyncio.wait_for(self.server.inbox.get(), seconds)
        except (TimeoutError, asyncio.QueueEmpty):
            return NOTHING

    async def _step(self) -> None:
        conditions = self.worker.conditions
        await asyncio.sleep(self.worker.world.rng.uniform(0.005, 0.03) + conditions.slow)
        if conditions.raises:
            conditions.raises = False
            raise RuntimeError("XlaRuntimeError: INTERNAL")
        hangs, conditions.hangs = conditions.hangs, False
        while hangs or not self.worker.computes():
            self.hung = True
            await asyncio.sleep(0.05)
        self.hung = False
        self._stepped = self.worker.world.loop.time()

    async def _watch(self) -> None:
        while not self.leader.watchdog.check():
            await asyncio.sleep(CHECK_SECONDS)


async def _frame(reader: asyncio.StreamReader) -> bytes:
    (length,) = LENGTH.unpack(await reader.readexactly(LENGTH.size))
    return await reader.readexactly(length)


def _as_earlier(kind: type[Any], frame: bytes, earlier: bool) -> bytes:
    """A frame as a peer of an earlier release reads or sends it."""
    return encode(decode(getattr(frozen_protocol_1, kind.__name__), frame)) if earlier else frame


def _send(end: End, message: Any, earlier: bool = False) -> None:
    frame = _as_earlier(type(message), encode(message), earlier)
    end.write(LENGTH.pack(len(frame)) + frame)


async def _pulse(end: End, sign: Done | LeaderOutput, earlier: bool = False) -> None:
    while not end.closed and not end.eof:
        _send(end, sign, earlier)
        await asyncio.sleep(PULSE_SECONDS)


def workers_of(world: World) -> list[SimProcess]:
    """Processes of workers that are there."""
    return [process for node in world.hosts for process in node.processes]
