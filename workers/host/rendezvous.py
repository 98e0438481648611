"""How the processes of a mesh of CPU hosts find each other for what crosses between their devices.

Each pair has a connection. Both ends prove that they know the epoch's secret, and neither sends it. Processes of one machine
agree to read each other's memory.
"""

from __future__ import annotations

import dataclasses
import hmac
import logging
import os
import pathlib
import secrets
import socket
import struct
import time

import jax

from workers.host.streams import HELLO_TIMEOUT, LinkError
from workers.kernels.cpu.collectives import NONCE, Memory, Peer, join
from workers.runtime.mesh import tell

_LOG = logging.getLogger(__name__)
_INTRODUCTION = struct.Struct(f">III{NONCE}s{NONCE}s36s")
_PROOF = 32


@dataclasses.dataclass(frozen=True)
class Introduction:
    """What an end of a connection sends first: its rank, its process, the descriptor and the nonce of its memory, a nonce of
    the connection, and which boot of which machine it runs in."""

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
    own = Introduction(rank, os.getpid(), memory.file, memory.nonce, b"", boot)
    peers = {rank: Peer(f"rank {rank}", -1, memory.file)}

    def admit(connection: socket.socket, connects: bool, expected: list[int]) -> None:
        found, file = greet(connection, connects, own, secret)
        if found.rank not in expected:
            raise LinkError(f"it is rank {found.rank}")
        peers[found.rank] = Peer(f"rank {found.rank} at {places[found.rank][0]}", connection.detach(), file)

    with socket.create_server((address, 0), family=family, backlog=64) as listener:
        told = tell("collectives", f"{listener.getsockname()[1]} {address}", seconds)
        places = [(address, int(port)) for port, address in (place.split(" ", 1) for place in told)]
        for other in range(rank):
            try:
                admit(socket.create_connection(places[other], timeout=seconds), True, [other])
            except (OSError, LinkError) as error:
                raise LinkError(f"rank {other} at {places[other][0]} can't be joined: {error}", other) from error
        while missing := [other for other in range(len(places)) if other not in peers]:
            try:
                listener.settimeout(max(deadline - time.monotonic(), 0.001))
                connection, _ = listener.accept()
            except TimeoutError:
                raise LinkError(f"ranks {missing} did not connect within {seconds:.0f} s", missing[0]) from None
            try:
                admit(connection, False, missing)
            except (OSError, LinkError) as error:  # the right one still comes
                _LOG.warning("refused a connection: %s", error)
                connection.close()
    join([peers[other] for other in range(len(places))], rank, devices, silence)
    for peer in peers.values():
        if peer.file >= 0:
            os.close(peer.file)  # it is mapped
    near = sum(peer.file >= 0 for peer in peers.values()) - 1
    _LOG.info("connected with %d hosts through memory, with %d over TCP", near, len(peers) - 1 - near)


def greet(connection: socket.socket, connects: bool, own: Introduction, secret: bytes) -> tuple[Introduction, int]:
    """Introduces this process at one end of a connection, of which one end `connects` and the other does not.

    Returns:
      how the other end introduces itself, and a descriptor of its memory, or -1 if these two can't map each other's.

    Raises:
      LinkError: it does not know the secret, or has gone.
      OSError: the connection broke, or nothing came in time.
    """
    connection.settimeout(HELLO_TIMEOUT)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    mine = _INTRODUCTION.pack(*dataclasses.astuple(dataclasses.replace(own, nonce=secrets.token_bytes(NONCE))))
    connection.sendall(mine)
    theirs = _read(connection, _INTRODUCTION.size)
    connection.sendall(_proof(secret, connects, mine, theirs))
    if not hmac.compare_digest(_read(connection, _PROOF), _proof(secret, not connects, theirs, mine)):
        raise LinkError("it does not know the epoch's secret")
    peer = Introduction(*_INTRODUCTION.unpack(theirs))
    memory = Memory(peer.file, peer.memory)
    file = memory.open(peer.process) if peer.boot == own.boot else None
    connection.sendall(b"-" if file is None else b"+")
    if _read(connection, 1) == b"+" and file is not None:
        return peer, file
    if file is not None:
        os.close(file)
    return peer, -1


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
