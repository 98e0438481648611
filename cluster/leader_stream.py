"""A stream to a replica's leader: of a gateway, whose requests it carries, or of the controller, which only watches."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
from collections.abc import Callable

from cluster.network import REAL, Network
from workers.host.streams import LENGTH, MAX_FRAME, PULSE_SECONDS
from workers.messages.codec import CodecError, decode, encode
from workers.messages.frames import Hello, LeaderInput, LeaderOutput, Status
from workers.messages.request import Load

_LOG = logging.getLogger(__name__)

#: Seconds within which a leader must listen once it serves.
CONNECT_SECONDS = 30.0
#: Seconds between this end's signs of life.
ALIVE_SECONDS = 1.0


@dataclasses.dataclass(frozen=True)
class LeaderAddress:
    """Where a replica's leader listens in an epoch, the secret that it asks for, and where to ask whether it lives."""

    replica: int
    epoch: int
    address: str
    secret: bytes = dataclasses.field(repr=False)
    liveness: str = ""


class LeaderStream:
    """The stream to one replica's leader in one epoch. `load`, `status` and `trying` are the last that came; `canary` are the
    logarithmic probabilities of the epoch's first token."""

    def __init__(
        self,
        leader: LeaderAddress,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        silence: float,
        network: Network = REAL,
    ) -> None:
        self.leader = leader
        self.load, self.status = Load(), Status()
        self.canary: tuple[float, ...] = ()
        self.trying = ""
        #: Whether it is being found out if the leader is lost.
        self.suspect = False
        self._most_silent = silence
        self._network = network
        self._silent = 0
        self._reader = reader
        self._writer = writer

    @classmethod
    async def connect(cls, leader: LeaderAddress, silence: float, network: Network = REAL) -> LeaderStream:
        """Opens the stream, as soon as the leader listens, and says Hello. Raises OSError after CONNECT_SECONDS."""
        host, port = leader.address.rsplit(":", 1)
        deadline = asyncio.get_running_loop().time() + CONNECT_SECONDS
        while True:
            try:
                async with asyncio.timeout_at(deadline):  # packets may be dropped on the way
                    reader, writer = await network.connect(host.strip("[]"), int(port))
                break
            except ConnectionRefusedError:
                if asyncio.get_running_loop().time() > deadline:
                    raise
                await asyncio.sleep(0.05)
        stream = cls(leader, reader, writer, silence, network)
        stream._write(Hello(leader.epoch, leader.secret))
        return stream

    async def run(self, on_output: Callable[[LeaderOutput], None], on_proven: Callable[[], None]) -> None:
        """Passes on what the leader sends until the stream ends, or the leader is silent and lost. `on_proven` is called when
        the first load comes, which shows that the mesh computes."""
        beside = [asyncio.ensure_future(work) for work in (self._watch(), self._send_signs_of_life())]
        try:
            await self._receive(on_output, on_proven)
        finally:
            for task in beside:
                task.cancel()

    def send(self, message: LeaderInput) -> None:
        self._write(message)

    def abort(self) -> None:
        """Ends the stream; `run` returns."""
        self._writer.transport.abort()

    def close(self) -> None:
        """Ends the stream once what was sent has left."""
        self._writer.close()

    async def _watch(self) -> None:
        # Turns of this loop are counted, not seconds: when it was itself held up, what came meanwhile is read first.
        replica, look = self.leader.replica, round(self._most_silent / PULSE_SECONDS)
        while True:
            await asyncio.sleep(PULSE_SECONDS)
            self._silent += 1
            if self._silent < look:
                self.suspect = False
            elif self._silent % look == 0:
                self.suspect = True
                silent = self._silent * PULSE_SECONDS
                reason = await self._network.why_lost(self.leader.liveness, silent)
                if reason is not None and self._silent >= look:
                    _LOG.error("the leader of replica %d is lost: %s", replica, reason)
                    self.abort()
                    return
                _LOG.warning("the leader of replica %d has been silent for %g s, but lives", replica, silent)

    async def _send_signs_of_life(self) -> None:
        while True:
            await asyncio.sleep(ALIVE_SECONDS)
            self._write(LeaderInput())

    async def _receive(self, on_output: Callable[[LeaderOutput], None], on_proven: Callable[[], None]) -> None:
        proven = False
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError, CodecError):
            while True:
                (length,) = LENGTH.unpack(await self._reader.readexactly(LENGTH.size))
                self._silent = 0
                if length > MAX_FRAME:
                    _LOG.error("replica %d sent a frame of %d bytes", self.leader.replica, length)
                    return
                output = decode(LeaderOutput, await self._reader.readexactly(length))
                if output.epoch != self.leader.epoch:
                    _LOG.warning("ignored a frame of epoch %d in epoch %d", output.epoch, self.leader.epoch)
                    continue
                if output.status is not None:
                    self.status = output.status
                if output.trying is not None:
                    self.trying = output.trying
                if output.load is not None:
                    self.load = output.load
                    if not proven:
                        proven, self.canary = True, output.canary
                        on_proven()
                on_output(output)

    def _write(self, message: Hello | LeaderInput) -> None:
        frame = encode(message)
        self._writer.write(LENGTH.pack(len(frame)) + frame)
