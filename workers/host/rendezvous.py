"""How the processes of a mesh of CPU hosts find each other for what crosses between their devices.

Each pair has a connection. Both ends prove that they know the epoch's secret, and neither sends it. Processes of one machine
agree to read each other's memory.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hmac
import logging
import os
import pathlib
import queue
import secrets
import socket
import struct
import threading
import time

import jax

from workers.host.streams import HELLO_TIMEOUT, LinkError
from workers.kernels.cpu.collectives import NONCE, Memory, Peer, join, region_bytes
from workers.runtime.mesh import tell

_LOG = logging.getLogger(__name__)
_INTRODUCTION = struct.Struct(f">IIQIII{NONCE}s{NONCE}s36s")
_PROOF = 32
#: Of what devices exchange; see `workers/kernels/cpu/src/transport.h`.
_PROTOCOL = 1
#: Connections whose other end is being found out at a time.
_MOST_GREETINGS = 64


@dataclasses.dataclass(frozen=True)
class Introduction:
    """What an end of a connection sends first.

    Attributes:
      protocol, devices, region: what both ends must have alike: what pieces mean, devices of a process, bytes of a region.
      rank, process, file: the sender's rank, its process and the descriptor of its memory.
      memory, nonce: nonces of that memory and of the connection.
      boot: which boot of which machine it runs in.
    """

    protocol: int
    devices: int
    region: int
    rank: int
    process: int
    file: int
    memory: bytes
    nonce: bytes
    boot: bytes


def meet(coordinator: str, rank: int, secret: bytes, silence: float, seconds: float) -> None:
    """Connects this process with all others of the mesh, which call this alike.

    Args:
      coordinator: `host:port` that the processes reach.
      rank: of this process.
      secret: of the epoch.
      silence: seconds for which a process may send nothing while others wait for it.
      seconds: that all of this may take.

    Raises:
      LinkError: a process can't be reached, or does not know the secret.
    """
    deadline, devices = time.monotonic() + seconds, jax.local_device_count()
    host, port = coordinator.rsplit(":", 1)
    with socket.create_connection((host.strip("[]"), int(port)), timeout=seconds) as probe:
        address, family = probe.getsockname()[0], probe.family
    memory = Memory.create(devices)
    boot = pathlib.Path("/proc/sys/kernel/random/boot_id").read_bytes().strip()
    own = Introduction(_PROTOCOL, devices, region_bytes(), rank, os.getpid(), memory.file, memory.nonce, b"", boot)
    peers = {rank: Peer(f"rank {rank}", -1, memory.file)}
    with socket.create_server((address, 0), family=family, backlog=_MOST_GREETINGS) as listener:
        told = tell("collectives", f"{listener.getsockname()[1]} {address}", seconds)
        places = [(address, int(port)) for port, address in (place.split(" ", 1) for place in told)]
        arrivals = _welcome(listener, own, secret)

        def admit(expected: list[int], connection: socket.socket, found: Introduction, file: int) -> None:
            if found.rank not in expected:
                raise LinkError(f"rank {found.rank} came, and is not expected")
            peers[found.rank] = Peer(f"rank {found.rank} at {places[found.rank][0]}", connection.detach(), file)

        for other in range(rank):
            left = max(deadline - time.monotonic(), 0.001)
            try:
                connection = socket.create_connection(places[other], timeout=left)
                admit([other], connection, *greet(connection, True, own, secret, left))
            except (OSError, LinkError) as error:
                raise LinkError(f"rank {other} at {places[other][0]} can't be joined: {error}", other) from error
        while missing := [other for other in range(len(places)) if other not in peers]:
            try:
                admit(missing, *arrivals.get(timeout=max(deadline - time.monotonic(), 0.001)))
            except queue.Empty:
                raise LinkError(f"ranks {missing} did not connect within {seconds:.0f} s", missing[0]) from None
        listener.shutdown(socket.SHUT_RDWR)  # wakes the thread that accepts
    join([peers[other] for other in range(len(places))], rank, devices, silence)
    for peer in peers.values():
        if peer.file >= 0:
            os.close(peer.file)  # it is mapped
    near = sum(peer.file >= 0 for peer in peers.values()) - 1
    _LOG.info("connected with %d hosts through memory, with %d over TCP", near, len(peers) - 1 - near)


def _welcome(
    listener: socket.socket, own: Introduction, secret: bytes
) -> queue.Queue[tuple[socket.socket, Introduction, int]]:
    """Greets whoever connects, some at a time, until the listener is closed; those who know the secret arrive in the queue."""
    arrivals: queue.Queue[tuple[socket.socket, Introduction, int]] = queue.Queue()
    places = threading.BoundedSemaphore(_MOST_GREETINGS)

    def one(connection: socket.socket) -> None:
        try:
            arrivals.put((connection, *greet(connection, False, own, secret, HELLO_TIMEOUT)))
        except (OSError, LinkError) as error:
            _LOG.warning("refused a connection: %s", error)
            connection.close()
        finally:
            places.release()

    def accept() -> None:
        with contextlib.suppress(OSError):  # closed
            while places.acquire():
                connection, _ = listener.accept()
                threading.Thread(target=one, args=(connection,), daemon=True, name="greet").start()

    threading.Thread(target=accept, daemon=True, name="welcome").start()
    return arrivals


def greet(
    connection: socket.socket, connects: bool, own: Introduction, secret: bytes, seconds: float
) -> tuple[Introduction, int]:
    """Introduces this process at one end of a connection, of which one end `connects` and the other does not.

    Returns:
      how the other end introduces itself, and a descriptor of its memory, or -1 if these two can't map each other's.

    Raises:
      LinkError: it does not know the secret, is of another kind, has gone, or takes more than `seconds`.
      OSError: the connection broke.
    """
    connection.settimeout(None)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    # A timer, since a socket's timeout would begin anew with each byte.
    timer = threading.Timer(seconds, _hang_up, (connection,))
    timer.start()
    file = None
    try:
        mine = _INTRODUCTION.pack(*dataclasses.astuple(dataclasses.replace(own, nonce=secrets.token_bytes(NONCE))))
        connection.sendall(mine)
        theirs = _read(connection, _INTRODUCTION.size)
        connection.sendall(_proof(secret, connects, mine, theirs))
        if not hmac.compare_digest(_read(connection, _PROOF), _proof(secret, not connects, theirs, mine)):
            raise LinkError("it does not know the epoch's secret")
        peer = Introduction(*_INTRODUCTION.unpack(theirs))
        for name in ("protocol", "devices", "region"):
            if getattr(peer, name) != getattr(own, name):
                raise LinkError(f"{name} {getattr(peer, name)} there, {getattr(own, name)} here")
        file = Memory(peer.file, peer.memory).open(peer.process) if peer.boot == own.boot else None
        connection.sendall(b"-" if file is None else b"+")
        if _read(connection, 1) == b"+" and file is not None:
            shared, file = file, None
            return peer, shared
        return peer, -1
    finally:
        timer.cancel()
        if file is not None:
            os.close(file)


def _hang_up(connection: socket.socket) -> None:
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)


def _proof(secret: bytes, connects: bool, own: bytes, other: bytes) -> bytes:
    return hmac.digest(secret, (b"connects" if connects else b"accepts") + own + other, "sha256")


def _read(connection: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        part = connection.recv(size - len(data))
        if not part:
            raise LinkError("it has closed the connection")
        data += part
    return data
