"""Collectives of CPU devices in C++ (src/collectives.cc): through memory on one machine, over TCP between machines."""

from __future__ import annotations

import ctypes
import dataclasses
import os
import pathlib
import secrets
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from workers.kernels.cpu.bindings import library
from workers.kernels.interface import Collectives, Group

#: Bytes of a region's nonce.
NONCE = 16
#: Bytes of Linux' cpu_set_t, a bit a processor.
_MASK = 128


@dataclasses.dataclass(frozen=True)
class Memory:
    """Where the devices of a process publish what others read. It is zero at first, and takes no more room than is written.

    Attributes:
      file: a descriptor of it in that process.
      nonce: random, by which who maps it knows that it is the right one.
    """

    file: int
    nonce: bytes

    @classmethod
    def create(cls, devices: int) -> Memory:
        memory = cls(os.memfd_create("grokmesh"), secrets.token_bytes(NONCE))
        os.ftruncate(memory.file, devices * region_bytes())
        os.pwrite(memory.file, memory.nonce, library().grokmesh_nonce_offset())
        mask = sum(1 << processor for processor in os.sched_getaffinity(0) if processor < 8 * _MASK)
        os.pwrite(memory.file, mask.to_bytes(_MASK, "little"), library().grokmesh_processors_offset())
        return memory

    def open(self, process: int) -> int | None:
        """A descriptor of this memory, which `process` made; None if it can't be had, as that is another one than meant."""
        path = pathlib.Path(f"/proc/{process}/fd/{self.file}")
        try:
            if not str(path.readlink()).startswith("/memfd:grokmesh"):
                return None
            file = os.open(path, os.O_RDWR)
        except OSError:
            return None
        if os.pread(file, NONCE, library().grokmesh_nonce_offset()) == self.nonce:
            return file
        os.close(file)
        return None


@dataclasses.dataclass(frozen=True)
class Peer:
    """A process of a mesh.

    Attributes:
      name: for messages.
      socket: descriptor of a connection to it; -1 for this process.
      file: that of its `Memory`, if this process can map it, and it this one's; else -1.
    """

    name: str
    socket: int
    file: int


def region_bytes() -> int:
    """Of a device in a `Memory`. Processes that differ in it can't exchange anything."""
    return int(library().grokmesh_region_bytes())


def join(peers: Sequence[Peer], process: int, devices: int, silence: float) -> None:
    """Makes this process one of a mesh of CPU devices: what crosses between them goes over these connections, which are the
    library's from now on. Who sends nothing for `silence` seconds while others wait for it is lost."""
    count = len(peers)
    sockets = (ctypes.c_int * count)(*(peer.socket for peer in peers))
    files = (ctypes.c_int * count)(*(peer.file for peer in peers))
    names = (ctypes.c_char_p * count)(*(peer.name.encode() for peer in peers))
    sizes = (ctypes.c_int64(size) for size in (count, process, devices))
    if not library().grokmesh_join(*sizes, sockets, files, names, ctypes.c_double(silence)):
        raise MemoryError("no memory for what crosses between devices")


def _call(name: str, x: jax.Array, group: Group, result: Any) -> jax.Array:
    sizes = {"world": group.world, "site": int(group.site), "size": group.size, "stride": group.stride}
    call: Callable[..., Any] = jax.ffi.ffi_call(name, result)
    crossed: jax.Array = call(x, group.rank, **{key: np.int64(value) for key, value in sizes.items()})
    return crossed


def _sum(x: jax.Array, group: Group) -> jax.Array:
    if x.dtype != jnp.float32:
        raise TypeError(f"a sum of {x.dtype}; devices add float32")
    return _call("grokmesh_sum", x, group, jax.ShapeDtypeStruct(x.shape, x.dtype))


def _gather(x: jax.Array, group: Group) -> jax.Array:
    return _call("grokmesh_gather", x, group, jax.ShapeDtypeStruct((group.size, *x.shape), x.dtype))


def _exchange(x: jax.Array, group: Group) -> jax.Array:
    rows, columns = x.shape
    result = jax.ShapeDtypeStruct((rows // group.size, columns * group.size), x.dtype)
    return _call("grokmesh_exchange", x, group, result)


COLLECTIVES = Collectives(_sum, _gather, _exchange)
