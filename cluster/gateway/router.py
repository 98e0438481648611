"""From sessions to leaders and back: one long-lived stream to each ready replica."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import struct
from collections.abc import Callable

from cluster.gateway.errors import GatewayError, Violation, exhausted, invalid, unavailable
from cluster.gateway.session import Session
from cluster.telemetry import metrics
from grok.engine.v1 import engine_pb2
from workers import wire
from workers.link import MAX_FRAME

_LOG = logging.getLogger(__name__)
_LENGTH = struct.Struct(">I")

#: Seconds that a leader has to listen after it was told to serve.
CONNECT_SECONDS = 30.0


@dataclasses.dataclass(frozen=True)
class LeaderAddress:
    """Where a replica's leader listens in an epoch, and the secret that it wants to hear."""

    replica: int
    epoch: int
    address: str
    secret: bytes = dataclasses.field(repr=False)


class ReplicaLink:
    """The stream to one replica's leader in one epoch, and the sessions that it carries."""

    def __init__(self, leader: LeaderAddress, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.leader = leader
        self.load = engine_pb2.Load()
        self.sessions: dict[str, Session] = {}
        self.draining = False
        self._reader = reader
        self._writer = writer

    @classmethod
    async def connect(cls, leader: LeaderAddress) -> ReplicaLink:
        """Opens the stream, as soon as the leader listens, and says Hello. Raises OSError after CONNECT_SECONDS."""
        host, port = leader.address.rsplit(":", 1)
        deadline = asyncio.get_running_loop().time() + CONNECT_SECONDS
        while True:
            try:
                reader, writer = await asyncio.open_connection(host, int(port))
                break
            except ConnectionRefusedError:
                if asyncio.get_running_loop().time() > deadline:
                    raise
                await asyncio.sleep(0.05)
        link = cls(leader, reader, writer)
        link._send(engine_pb2.Hello(epoch=leader.epoch, secret=leader.secret))
        return link

    def submit(self, session: Session) -> None:
        """Sends a session's request; its tokens will be delivered to it."""
        self.sessions[session.request.id] = session
        self._send(engine_pb2.LeaderInput(submit=wire.request_to_proto(session.request)))

    def cancel(self, session: Session) -> None:
        """Forgets a session, here and on the leader, unless it has ended already."""
        if self.sessions.pop(session.request.id, None) is not None:
            self._send(engine_pb2.LeaderInput(cancel=engine_pb2.Cancel(request_id=session.request.id)))

    async def run(self) -> None:
        """Delivers what the leader sends until the stream ends."""
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                (length,) = _LENGTH.unpack(await self._reader.readexactly(_LENGTH.size))
                if length > MAX_FRAME:
                    _LOG.error("replica %d sent a frame of %d bytes", self.leader.replica, length)
                    return
                self._hear(engine_pb2.LeaderOutput.FromString(await self._reader.readexactly(length)))

    def close(self, error: GatewayError) -> None:
        """Ends the stream; its sessions get `error`."""
        self._writer.close()
        for session in self.sessions.values():
            session.deliver(error)
        self.sessions.clear()

    def _hear(self, output: engine_pb2.LeaderOutput) -> None:
        if output.epoch != self.leader.epoch:
            _LOG.warning("ignored a frame of epoch %d in epoch %d", output.epoch, self.leader.epoch)
            return
        self.load = output.load
        for message in output.tokens:
            event = wire.event_from_proto(message)
            session = self.sessions.get(event.request_id)
            if session is not None:
                if event.finish is not None:
                    del self.sessions[event.request_id]
                session.deliver(event)
        for refusal in output.refusals:
            session = self.sessions.pop(refusal.request_id, None)
            if session is not None:
                session.deliver(_refused(refusal))

    def _send(self, message: engine_pb2.Hello | engine_pb2.LeaderInput) -> None:
        frame = message.SerializeToString()
        self._writer.write(_LENGTH.pack(len(frame)) + frame)


class Router:
    """Knows the ready replicas and sends each session to the least busy one."""

    def __init__(self, on_change: Callable[[int], None] = lambda _: None) -> None:
        self._links: dict[int, ReplicaLink] = {}
        self._on_change = on_change

    @property
    def ready(self) -> int:
        """Number of replicas that take sessions."""
        return sum(not link.draining for link in self._links.values())

    @property
    def queued(self) -> int:
        """Number of sessions that have no token yet. May be asked by any thread."""
        return sum(
            not session.tokens for link in list(self._links.values()) for session in list(link.sessions.values())
        )

    def load(self, replica: int) -> engine_pb2.Load:
        """A replica's load as it last told it."""
        link = self._links.get(replica)
        return link.load if link else engine_pb2.Load()

    async def serve(self, leader: LeaderAddress, on_connected: Callable[[], None]) -> None:
        """Carries sessions to a replica until its stream ends, then fails those that are left. Raises OSError."""
        link = await ReplicaLink.connect(leader)
        self._links[leader.replica] = link
        on_connected()
        self._changed()
        try:
            await link.run()
        finally:
            del self._links[leader.replica]
            link.close(unavailable(f"replica {leader.replica} was lost; it is being rebuilt"))
            self._changed()

    @property
    def sessions(self) -> int:
        """Number of sessions on all replicas."""
        return sum(len(link.sessions) for link in self._links.values())

    def busy(self, replica: int) -> bool:
        """Whether a replica has sessions."""
        link = self._links.get(replica)
        return link is not None and bool(link.sessions)

    def drain(self, replica: int) -> None:
        """Sends no more sessions to a replica; those that it has go on."""
        if (link := self._links.get(replica)) is not None:
            link.draining = True
            self._changed()

    def start(self, session: Session) -> ReplicaLink:
        """Sends a session to the least busy replica. Raises GatewayError (UNAVAILABLE) when none is ready."""
        links = [link for link in self._links.values() if not link.draining]
        if not links:
            metrics.REJECTIONS.labels("no_replica").inc()
            raise unavailable("no replica is ready", retry_seconds=2.0)
        link = min(links, key=lambda link: (len(link.sessions), link.leader.replica))
        link.submit(session)
        return link

    def _changed(self) -> None:
        metrics.REPLICAS_READY.set(self.ready)
        self._on_change(self.ready)


def _refused(refusal: engine_pb2.Refusal) -> GatewayError:
    if refusal.full:
        metrics.REJECTIONS.labels("engine_full").inc()
        return exhausted(refusal.reason, retry_seconds=1.0)
    return invalid([Violation("completion", refusal.reason)])
