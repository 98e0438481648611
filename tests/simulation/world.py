"""Hosts, processes and the network between them. One random generator decides everything."""

from __future__ import annotations

import asyncio
import collections
import contextvars
import hashlib
import itertools
import random
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

from tests.simulation.loop import BEGIN, OWNER, VirtualLoop
from workers.host.liveness import CONFIRM_SECONDS

Accept = Callable[[asyncio.StreamReader, "End"], Coroutine[Any, Any, None]]


class World:
    """All hosts, what listens where, and who reaches whom. `notes` tell what happened; `defects` are broken promises."""

    def __init__(self, seed: int, hosts: int) -> None:
        self.rng = random.Random(seed)
        loop = asyncio.get_running_loop()
        assert isinstance(loop, VirtualLoop)
        self.loop = loop
        self.nobodys = contextvars.copy_context()
        #: Until when a process was stopped.
        self.stopped_until = 0.0
        self.hosts = [SimNode(self, f"10.0.0.{i + 1}") for i in range(hosts)]
        self.front = SimNode(self, "10.0.1.1")
        self.cut: set[frozenset[str]] = set()
        self.listeners: dict[str, tuple[SimProcess, Accept]] = {}
        self.processes: dict[int, SimProcess] = {}
        self.numbers = itertools.count(20000)
        self.notes: list[str] = []
        self.defects: list[str] = []
        self._trace = hashlib.sha256()

    @property
    def digest(self) -> str:
        """Of all notes: the same for the same seed."""
        return self._trace.hexdigest()

    def note(self, text: str) -> None:
        line = f"{self.loop.time() - BEGIN:9.3f} {text}"
        self.notes.append(line)
        self._trace.update(line.encode())

    def reaches(self, one: SimNode, other: SimNode) -> bool:
        if one is other:
            return one.on
        cut = frozenset((one.address, other.address)) in self.cut
        return one.on and other.on and not (one.alone or other.alone or cut)

    def latency(self) -> float:
        return self.rng.uniform(0.0001, 0.002)

    def node(self, address: str) -> SimNode:
        return next(node for node in (*self.hosts, self.front) if node.address == address)


class SimNode:
    """A host: `on`, or without power; `alone`, if cut off; `sick`, if its devices are broken; `free`, if no replica has it."""

    def __init__(self, world: World, address: str) -> None:
        self.world, self.address, self.id = world, address, f"node-{address}"
        self.on, self.alone, self.sick, self.free = True, False, False, True
        self.processes: list[SimProcess] = []

    def power_off(self) -> None:
        self.on = False
        for process in list(self.processes):
            process.die(silently=True)


class SimProcess:
    """Tasks and sockets that end together."""

    def __init__(self, node: SimNode) -> None:
        self.world, self.node, self.pid = node.world, node, next(node.world.numbers)
        self.dead = asyncio.Event()
        self.stopped = False
        self.ends: list[End] = []
        self._tasks: dict[asyncio.Task[Any], None] = {}  # in an order that does not depend on addresses
        node.processes.append(self)
        self.world.processes[self.pid] = self

    @property
    def runs(self) -> bool:
        return not self.stopped and not self.dead.is_set()

    def spawn(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        context = contextvars.copy_context()
        context.run(OWNER.set, self)
        task = self.world.loop.create_task(work, context=context)
        self._tasks[task] = None
        task.add_done_callback(self._done)
        if self.dead.is_set():
            task.cancel()
        return task

    def listen(self, address: str, accept: Accept) -> None:
        self.world.listeners[address] = self, accept

    def stop(self, seconds: float | None = None) -> None:
        """As SIGSTOP does, and SIGCONT after so many seconds: its sockets stay open, and nothing comes from them."""
        self.stopped = True
        self.world.loop.pause(self)
        if seconds is not None:
            self.world.stopped_until = max(self.world.stopped_until, self.world.loop.time() + seconds)
            self.world.loop.call_later(seconds, self._go_on)

    def _go_on(self) -> None:
        self.stopped = False
        self.world.loop.resume(self)

    def die(self, *, silently: bool = False) -> None:
        """As SIGKILL does. Peers are told by its host, unless that has lost its power."""
        if self.dead.is_set():
            return
        self.dead.set()
        for task in list(self._tasks):
            task.cancel()
        self.world.loop.resume(self)
        self.node.processes.remove(self)
        for address in [address for address, (owner, _) in self.world.listeners.items() if owner is self]:
            del self.world.listeners[address]
        for end in self.ends:
            if silently:
                end.vanish()
            else:
                end.close()

    def _done(self, task: asyncio.Task[Any]) -> None:
        self._tasks.pop(task, None)
        if not task.cancelled() and self.runs:
            task.exception()  # whether one asks or not


class End:
    """One end of a TCP stream; what asyncio's streams have of a StreamWriter, and its transport."""

    def __init__(self, process: SimProcess) -> None:
        self.process, self.world = process, process.world
        self.reader = asyncio.StreamReader(limit=2**30)
        self.peer: End
        self.transport = self
        self.closed = self.eof = self.vanished = False
        self._queue: collections.deque[bytes | None] = collections.deque()
        self._due = 0.0
        self._on_its_way = False
        process.ends.append(self)

    def write(self, data: bytes) -> None:
        if not self.closed and not self.vanished:
            self._send(data)

    def close(self) -> None:
        if not self.closed and not self.vanished:
            self.closed = True
            self._send(None)
            self.end()

    abort = close

    def vanish(self) -> None:
        self.vanished = True
        self._queue.clear()

    def end(self) -> None:
        """Nothing comes any more."""
        if not self.eof:
            self.eof = True
            self.reader.feed_eof()

    def _send(self, data: bytes | None) -> None:
        self._queue.append(data)
        if not self._on_its_way:
            self._on_its_way = True
            self._due = max(self._due, self.world.loop.time() + self.world.latency())
            self.world.loop.call_at(self._due, self._arrive, context=self.world.nobodys)

    def _arrive(self) -> None:
        if self.vanished or not self._queue:
            self._on_its_way = False
            return
        if not self.world.reaches(self.process.node, self.peer.process.node):  # it is sent again and again
            self.world.loop.call_later(0.2, self._arrive)
            return
        while self._queue:
            data = self._queue.popleft()
            if self.peer.vanished or self.peer.eof:
                continue
            if data is None:
                self.peer.end()
            else:
                self.peer.reader.feed_data(data)
        self._on_its_way = False


class SimNetwork:
    """The network as one process sees it; a `cluster.network.Network`."""

    def __init__(self, process: SimProcess) -> None:
        self._process, self._world = process, process.world

    async def connect(self, host: str, port: int) -> tuple[asyncio.StreamReader, Any]:
        """Opens a stream. Raises OSError."""
        here, there, address = self._process.node, self._world.node(host), f"{host}:{port}"
        await asyncio.sleep(self._world.latency())
        for pause in (1, 2, 4, 8, 16, 32):  # packets that open it are sent again
            if self._world.reaches(here, there):
                break
            await asyncio.sleep(pause)
        else:
            raise TimeoutError(address)
        owner, accept = self._world.listeners.get(address, (None, None))
        if owner is None or accept is None:
            raise ConnectionRefusedError(address)
        ours, theirs = End(self._process), End(owner)
        ours.peer, theirs.peer = theirs, ours
        owner.spawn(accept(theirs.reader, theirs))
        return ours.reader, ours

    async def why_lost(self, address: str, silent: float, confirm: float = CONFIRM_SECONDS) -> str | None:
        """Asks the host of a worker; its address ends with the worker's process id."""
        if not address:
            return "it is silent"
        host, pid = address.rsplit(":", 1)
        process, deadline = self._world.processes[int(pid)], self._world.loop.time() + confirm
        del silent
        while True:
            if self._world.reaches(self._process.node, self._world.node(host)):
                if process.dead.is_set():
                    return "its process has ended"
                if not process.stopped:
                    return None
                reason = "its process is stopped"
            else:
                reason = "its host can't be reached"
            if self._world.loop.time() >= deadline:
                return reason
            await asyncio.sleep(0.1)


async def call(caller: SimProcess, callee: SimProcess, function: Callable[..., Awaitable[Any]], arguments: Any) -> Any:
    """A remote call: what it comes to, once there is a way for the answer. Raises DeadError when the callee is found to be
    dead: soon if its host is there, after some seconds if not."""
    world, rng = caller.world, caller.world.rng
    await asyncio.sleep(world.latency())
    died = asyncio.ensure_future(callee.dead.wait())
    running: asyncio.Task[Any] | None = None
    reached = world.loop.time()
    try:
        while not callee.dead.is_set():
            if world.reaches(caller.node, callee.node):
                reached = world.loop.time()
                running = running or callee.spawn(_run(function, arguments))
                if running.done() and not running.cancelled():
                    await asyncio.sleep(world.latency())
                    return running.result()
            elif world.loop.time() - reached > 6:  # Ray takes its host for dead
                raise DeadError("the node is dead")
            waits = died, *([running] if running and not running.done() else [])
            seconds = None if len(waits) > 1 and not callee.stopped else 0.2
            await asyncio.wait(waits, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        await asyncio.sleep(rng.uniform(0.02, 0.3) if callee.node.on else rng.uniform(3, 9))
        raise DeadError("the process died")
    finally:
        died.cancel()


async def _run(function: Callable[..., Awaitable[Any]], arguments: Any) -> Any:
    return await function(*arguments)


class DeadError(Exception):
    """A callee is dead."""
