"""The stream between this gateway and one replica's leader."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
from collections.abc import Callable

from cluster.gateway.session import Session
from workers.host.liveness import why_lost
from workers.host.streams import LENGTH, MAX_FRAME, PULSE_SECONDS
from workers.messages.codec import CodecError, decode, encode
from workers.messages.frames import Hello, LeaderInput, LeaderOutput, Refusal, Status
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


class ReplicaLink:
    """The stream to one replica's leader in one epoch, and the sessions that it carries."""

    def __init__(
        self,
        leader: LeaderAddress,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        on_refused: Callable[[Session, Refusal], None],
        on_token: Callable[[Session], None],
        silence: float,
    ) -> None:
        self.leader = leader
        self._most_silent = silence
        self._on_refused = on_refused
        self._on_token = on_token
        self.load, self.status = Load(), Status()
        #: Logarithmic probabilities of the epoch's first token.
        self.canary: tuple[float, ...] = ()
        self.sessions: dict[str, Session] = {}
        self.draining = False
        #: Whether it is being found out if the leader is lost.
        self.suspect = False
        self._proven = False
        self._on_proven: Callable[[], None] = lambda: None
        self._silent = 0
        self._reader = reader
        self._writer = writer

    @classmethod
    async def connect(
        cls,
        leader: LeaderAddress,
        on_refused: Callable[[Session, Refusal], None],
        on_token: Callable[[Session], None],
        silence: float,
    ) -> ReplicaLink:
        """Opens the stream, as soon as the leader listens, and says Hello. Raises OSError after CONNECT_SECONDS."""
        host, port = leader.address.rsplit(":", 1)
        deadline = asyncio.get_running_loop().time() + CONNECT_SECONDS
        while True:
            try:
                async with asyncio.timeout_at(deadline):  # packets may be dropped on the way
                    reader, writer = await asyncio.open_connection(host.strip("[]"), int(port))
                break
            except ConnectionRefusedError:
                if asyncio.get_running_loop().time() > deadline:
                    raise
                await asyncio.sleep(0.05)
        link = cls(leader, reader, writer, on_refused, on_token, silence)
        link._send(Hello(leader.epoch, leader.secret))
        return link

    @property
    def outstanding(self) -> int:
        """Tokens that its sessions still wait for."""
        return sum(session.owed for session in self.sessions.values())

    def submit(self, session: Session) -> None:
        """Sends a session's request; the tokens that it lacks will be delivered to it."""
        self.sessions[session.request.id] = session
        session.replica, session.epoch = self.leader.replica, self.leader.epoch
        self._send(LeaderInput(submit=session.rest()))

    def cancel(self, session: Session) -> None:
        """Forgets a session, here and on the leader, unless it has ended already."""
        if self.sessions.pop(session.request.id, None) is not None:
            self._send(LeaderInput(cancel=session.request.id))

    async def run(self, on_proven: Callable[[], None]) -> None:
        """Delivers what the leader sends until the stream ends, or nothing comes for too long. `on_proven` is called when the
        first load comes, which shows that the mesh computes."""
        self._on_proven = on_proven
        beside = [asyncio.ensure_future(work) for work in (self._watch(), self._tell_alive())]
        try:
            await self._listen()
        finally:
            for task in beside:
                task.cancel()

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
                reason = await asyncio.to_thread(why_lost, self.leader.liveness, silent)
                if reason is not None and self._silent >= look:
                    _LOG.error("the leader of replica %d is lost: %s", replica, reason)
                    self.abort()
                    return
                _LOG.warning("the leader of replica %d has been silent for %g s, but lives", replica, silent)

    async def _tell_alive(self) -> None:
        while True:
            await asyncio.sleep(ALIVE_SECONDS)
            self._send(LeaderInput())

    async def _listen(self) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError, CodecError):
            while True:
                (length,) = LENGTH.unpack(await self._reader.readexactly(LENGTH.size))
                self._silent = 0
                if length > MAX_FRAME:
                    _LOG.error("replica %d sent a frame of %d bytes", self.leader.replica, length)
                    return
                self._hear(decode(LeaderOutput, await self._reader.readexactly(length)))

    def abort(self) -> None:
        """Ends the stream; `run` returns."""
        self._writer.transport.abort()

    def close(self) -> list[Session]:
        """Ends the stream; returns the sessions that it leaves behind."""
        self._writer.close()
        left = list(self.sessions.values())
        self.sessions.clear()
        return left

    def _hear(self, output: LeaderOutput) -> None:
        if output.epoch != self.leader.epoch:
            _LOG.warning("ignored a frame of epoch %d in epoch %d", output.epoch, self.leader.epoch)
            return
        if output.status is not None:
            self.status = output.status
        if output.load is not None:
            self.load = output.load
            if not self._proven:
                self._proven, self.canary = True, output.canary
                self._on_proven()
        for event in output.tokens:
            session = self.sessions.get(event.request_id)
            if session is not None:
                if event.finish is not None:
                    del self.sessions[event.request_id]
                session.deliver(event)
                self._on_token(session)
        for refusal in output.refusals:
            session = self.sessions.pop(refusal.request_id, None)
            if session is not None:
                self._on_refused(session, refusal)

    def _send(self, message: Hello | LeaderInput) -> None:
        frame = encode(message)
        self._writer.write(LENGTH.pack(len(frame)) + frame)
