"""The ordered streams of a replica: frames over TCP, from the leader to followers and between the leader and gateways.

A frame is four bytes of length, big-endian, and a message of `workers.messages.frames`. Every connection begins with a Hello
that knows the epoch and its secret.
"""

from __future__ import annotations

import contextlib
import hmac
import logging
import queue
import socket
import struct
import threading
import time

from workers.host.activity import Activity
from workers.host.liveness import why_lost
from workers.messages.codec import CodecError, decode, encode
from workers.messages.frames import PROTOCOL, Done, Hello, LeaderInput, LeaderOutput, PlanFrame
from workers.messages.plan import Plan
from workers.telemetry import metrics

_LOG = logging.getLogger(__name__)
#: Of a frame: its length comes first.
LENGTH = struct.Struct(">I")

#: A plan that admits a full context of Grok-1 with every bias allowed takes 100 kB; more than this is no frame.
MAX_FRAME = 16 * 1024 * 1024
#: Seconds that a new connection has to say Hello, and the most bytes that it may take.
HELLO_TIMEOUT = 5.0
MAX_HELLO = 1024
#: Plans whose sending times are kept: no follower is ever so many behind.
MAX_LAG = 64
#: Frames to a gateway that may wait before it is given up.
MAX_OUTGOING = 10_000
#: Seconds between signs of life on a stream that its peer watches.
PULSE_SECONDS = 0.25
#: A follower's signs of life are late that has sent nothing for so many seconds.
LATE_SECONDS = 2 * PULSE_SECONDS
#: Connections that may be about to say Hello: each has two threads.
MAX_GREETINGS = 256
#: Gateways may be silent for longer: their loops are busy, and a late one harms no other request.
GATEWAY_SILENCE_SECONDS = 15.0


class LinkError(ConnectionError):
    """A peer is gone, or does not speak the protocol. `rank` is that of the follower, where it is one."""

    def __init__(self, message: str, rank: int | None = None) -> None:
        super().__init__(message)
        self.rank = rank


class SilenceError(LinkError):
    """Nothing has come for as long as `settimeout` allows. The stream can still be read."""


class Link:
    """One end of a stream. Any thread may send, one may receive."""

    def __init__(self, connection: socket.socket) -> None:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._connection = connection
        self._buffer = bytearray()
        self._closed = False
        self._sending = threading.Lock()

    def send(self, frame: bytes) -> None:
        """Sends one frame. Raises LinkError when the peer is gone or the frame is longer than MAX_FRAME."""
        if len(frame) > MAX_FRAME:
            raise LinkError(f"a frame of {len(frame)} bytes")
        try:
            with self._sending:
                self._connection.sendall(LENGTH.pack(len(frame)) + frame)
        except OSError as error:
            raise LinkError(f"peer is gone: {error}") from error

    def receive(self, longest: int = MAX_FRAME) -> bytes | None:
        """The next frame, or None when the peer has closed the stream. Raises LinkError when it broke, SilenceError."""
        if not self._fill(LENGTH.size):
            return None
        (length,) = LENGTH.unpack_from(self._buffer)
        if length > longest:
            raise LinkError(f"a frame of {length} bytes")
        if not self._fill(LENGTH.size + length):
            return None
        frame = bytes(self._buffer[LENGTH.size : LENGTH.size + length])
        del self._buffer[: LENGTH.size + length]
        return frame

    def settimeout(self, seconds: float | None) -> None:
        """Bounds each following operation. On a stream that has been closed, they fail anyway."""
        with contextlib.suppress(OSError):
            self._connection.settimeout(seconds)

    def close(self) -> None:
        """Ends the stream; a blocked `receive` returns None, here too."""
        self._closed = True
        with contextlib.suppress(OSError):
            self._connection.shutdown(socket.SHUT_RDWR)
        self._connection.close()

    def _fill(self, count: int) -> bool:
        """Receives until there are so many bytes; False when the stream has been closed, between frames or at this end."""
        while len(self._buffer) < count:
            try:
                received = self._connection.recv(65536)
            except TimeoutError as error:
                raise SilenceError("nothing has come") from error
            except OSError as error:
                if self._closed:
                    return False
                raise LinkError(f"peer is gone: {error}") from error
            if not received:
                if self._buffer:
                    raise LinkError("the stream ended within a frame")
                return False
            self._buffer += received
        return True


class GatewayLink:
    """The leader's end of a gateway's stream: frames out are queued, so that no gateway can delay a step."""

    def __init__(self, link: Link) -> None:
        self._link = link
        self._outgoing: queue.Queue[bytes] = queue.Queue(MAX_OUTGOING)
        self.open = True
        threading.Thread(target=self._write, daemon=True, name="gateway-writer").start()

    def send(self, output: LeaderOutput) -> None:
        """Queues a frame. A gateway that does not read is closed."""
        try:
            self._outgoing.put_nowait(encode(output))
        except queue.Full:
            _LOG.error("a gateway reads too slowly; closing its stream")
            self.close()

    def flush(self, until: float) -> None:
        """Returns once all frames are on their way, when the stream has ended, or at a time of `time.monotonic`."""
        while self.open and self._outgoing.unfinished_tasks and time.monotonic() < until:
            time.sleep(0.001)

    def close(self) -> None:
        self.open = False
        self._link.close()

    def _write(self) -> None:
        while self.open:
            with contextlib.suppress(queue.Empty):
                frame = self._outgoing.get(timeout=1.0)
                try:
                    self._link.send(frame)
                except LinkError:
                    self.open = False
                self._outgoing.task_done()


#: What the leader's loop gets: a gateway's input (an empty one when it has joined), or None when it is gone. Without a gateway
#: it is only woken.
Incoming = tuple[GatewayLink | None, LeaderInput | None]


class LeaderServer:
    """Where followers and gateways connect. Followers are waited for, and all is over when one is lost, be it in mid-step or
    while nothing happens; gateways may come and go.
    """

    def __init__(self, address: str, epoch: int, secret: bytes, silence: float) -> None:
        """Listens. Followers that send nothing for `silence` seconds are suspected, and lost unless they prove to live."""
        host, port = address.rsplit(":", 1)
        self._silence = silence
        self._greetings = threading.BoundedSemaphore(MAX_GREETINGS)
        self._epoch = epoch
        self._secret = secret
        self._followers: dict[int, Link] = {}
        self._sent: dict[int, float] = {}
        #: When something last came from each follower.
        self._heard: dict[int, float] = {}
        #: What followers do with their processors.
        self.activity = Activity()
        #: The last plan that each follower has carried out.
        self.done: dict[int, int] = {}
        self._last_sent = 0
        self._closed = False
        #: Why the mesh is given up, once it is.
        self.broken = LinkError("the mesh is broken")
        self._gateways: set[GatewayLink] = set()
        self._joined = threading.Condition()
        #: None when all is over.
        self.inbox: queue.SimpleQueue[Incoming | None] = queue.SimpleQueue()
        self._listener = socket.create_server((host, int(port)), backlog=64)
        threading.Thread(target=self._accept, daemon=True, name="leader-accept").start()

    def wait_for_followers(self, count: int, seconds: float) -> None:
        """Returns once `count` followers are there. Raises LinkError after `seconds`."""
        with self._joined:
            if not self._joined.wait_for(lambda: len(self._followers) == count, seconds):
                raise LinkError(f"{len(self._followers)} of {count} followers joined within {seconds} s")

    def broadcast(self, plan: Plan) -> None:
        """Sends a plan to all followers. Raises LinkError when one is gone."""
        if self._closed:
            raise self.broken
        frame = encode(PlanFrame(self._epoch, plan))
        self._last_sent = plan.number
        if self._followers:
            self._sent[plan.number] = time.perf_counter()
            self._sent.pop(plan.number - MAX_LAG, None)
        for link in self._followers.values():
            link.send(frame)

    @property
    def failure(self) -> LinkError | None:
        """Why the mesh is over, if it is."""
        return self.broken if self._closed else None

    def late(self) -> bool:
        """Whether a follower's signs of life are late."""
        oldest = time.monotonic() - LATE_SECONDS
        return any(heard < oldest for heard in list(self._heard.values()))

    def wake(self) -> None:
        """Wakes the leader's loop. Any thread may call it."""
        self.inbox.put((None, None))

    def give_up(self, reason: str, rank: int | None = None) -> None:
        """Ends all streams because the mesh is broken, if it is known by the follower `rank`: so gateways know at once, and the
        leader with its next plan."""
        if not self._closed:
            _LOG.error("%s; giving up", reason)
            self.broken = LinkError(reason, rank)
            self.close()

    def close(self) -> None:
        """Ends all streams and takes no more connections."""
        self._closed = True
        self.inbox.put(None)
        for gateway in list(self._gateways):
            gateway.close()
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # wakes a blocked accept
        self._listener.close()
        for link in self._followers.values():
            link.close()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                if self._closed:
                    return
                time.sleep(0.05)  # out of descriptors, or a peer that gave up: others may still come
                continue
            if not self._greetings.acquire(blocking=False):
                connection.close()
                continue
            try:
                threading.Thread(target=self._greet, args=(connection,), daemon=True, name="leader-greet").start()
            except RuntimeError:  # no more threads
                self._greetings.release()
                connection.close()

    def _greet(self, connection: socket.socket) -> None:
        try:
            link = Link(connection)
            # A timer, since a socket's timeout would begin anew with each byte.
            timer = threading.Timer(HELLO_TIMEOUT, link.close)
            timer.start()
            try:
                hello = decode(Hello, link.receive(MAX_HELLO) or b"")
            finally:
                timer.cancel()
            if hello.epoch != self._epoch or not hmac.compare_digest(hello.secret, self._secret):
                raise LinkError("wrong epoch or secret")
            if hello.protocol != PROTOCOL:
                raise LinkError(f"a peer speaks version {hello.protocol} of the protocol; {PROTOCOL} is spoken here")
        except (OSError, RuntimeError, CodecError) as error:  # a LinkError too
            _LOG.warning("refused a connection: %s", error)
            connection.close()
            return
        finally:
            self._greetings.release()
        if hello.rank is not None:
            with self._joined:
                if hello.rank in self._followers:
                    _LOG.warning("refused a second follower of rank %d", hello.rank)
                    link.close()
                    return
                rank = hello.rank
                self.done[rank] = 0
                metrics.PLAN_LAG.labels(str(rank)).set_function(lambda: max(self._last_sent - self.done[rank], 0))
                self._followers = {**self._followers, rank: link}
                self._joined.notify_all()
            self._read_follower(link, rank, hello.liveness)
        else:
            self._read_gateway(link)

    def _read_follower(self, link: Link, rank: int, liveness: str) -> None:
        """Notes how far a follower is behind, and that it lives."""
        link.settimeout(self._silence)
        seconds = metrics.PLAN_SECONDS.labels(str(rank))
        try:
            while (frame := self._frame_of(link, rank, liveness)) is not None:
                done = decode(Done, frame)
                number = done.number
                self.activity.note(rank, done.processor_seconds)
                sent = self._sent.get(number)
                if sent is not None and number > self.done[rank]:
                    seconds.observe(time.perf_counter() - sent)
                self.done[rank] = max(number, self.done[rank])
            self.give_up(f"follower {rank} has ended", rank)
        except (LinkError, CodecError) as error:
            self.give_up(f"follower {rank} is lost: {error}", rank)

    def _frame_of(self, link: Link, rank: int, liveness: str) -> bytes | None:
        """A follower's next frame. Raises LinkError when its stream is broken, and when it is silent and does not prove to
        live."""
        since = self._heard[rank] = time.monotonic()
        while True:
            try:
                return link.receive(MAX_HELLO)
            except SilenceError as silence:
                reason = why_lost(liveness, time.monotonic() - since)
                if reason is not None:
                    raise LinkError(reason) from silence
                _LOG.warning("follower %d has been silent for %.1f s, but lives", rank, time.monotonic() - since)

    def _read_gateway(self, link: Link) -> None:
        gateway = GatewayLink(link)
        self._gateways.add(gateway)
        threading.Thread(target=self._pulse, args=(gateway,), daemon=True, name="gateway-pulse").start()
        self.inbox.put((gateway, LeaderInput()))
        link.settimeout(GATEWAY_SILENCE_SECONDS)
        try:
            while (frame := link.receive()) is not None:
                self.inbox.put((gateway, decode(LeaderInput, frame)))
        except (LinkError, CodecError) as error:
            _LOG.warning("a gateway's stream broke: %s", error)
        gateway.close()
        self._gateways.discard(gateway)
        self.inbox.put((gateway, None))

    def _pulse(self, gateway: GatewayLink) -> None:
        """Sends a gateway signs of life."""
        while gateway.open:
            gateway.send(LeaderOutput(self._epoch))
            time.sleep(PULSE_SECONDS)


def connect(address: str, hello: Hello, seconds: float) -> Link:
    """A follower's stream to the leader, tried for `seconds` until the leader listens. Raises LinkError."""
    link = Link(_connection(address, seconds))
    link.send(encode(hello))
    link.settimeout(None)
    return link


def wait_for_listener(address: str, seconds: float) -> None:
    """Returns once a process listens at `host:port`. Raises LinkError after `seconds`."""
    _connection(address, seconds).close()


def _connection(address: str, seconds: float) -> socket.socket:
    host, port = address.rsplit(":", 1)
    deadline = time.monotonic() + seconds
    while True:
        try:
            return socket.create_connection((host.strip("[]"), int(port)), timeout=HELLO_TIMEOUT)
        except OSError as error:
            if time.monotonic() > deadline:
                raise LinkError(f"no process listens at {address}: {error}") from error
            time.sleep(0.02)


def free_port(address: str) -> int:
    """A port of `address` that is free now."""
    with socket.socket() as probe:
        probe.bind((address, 0))
        port: int = probe.getsockname()[1]
        return port
