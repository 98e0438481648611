"""Loading the C++ library (src/)."""

from __future__ import annotations

import ctypes
import functools
import importlib.util

import jax

_OPERATIONS = (
    "norm",
    "route",
    "dense",
    "experts",
    "logits",
    "attend",
    "sample",
    "score",
    "sum",
    "gather",
    "exchange",
)


class NativeKernelsError(RuntimeError):
    """The library was not built, or can't be loaded."""


@functools.cache
def library() -> ctypes.CDLL:
    """The library, whose operations JAX knows from then on. Raises NativeKernelsError."""
    found = importlib.util.find_spec("workers.kernels.cpu.native")
    if found is None or found.origin is None:
        raise NativeKernelsError(
            "the CPU kernels were not built; install a C++ compiler and then the package again (pip install -e .)"
        )
    try:
        native = ctypes.CDLL(found.origin)
    except OSError as error:
        raise NativeKernelsError(f"the CPU kernels can't be loaded: {error}") from error
    for name in _OPERATIONS:
        capsule = jax.ffi.pycapsule(getattr(native, f"grokmesh_{name}"))
        jax.ffi.register_ffi_target(f"grokmesh_{name}", capsule, platform="cpu")
    native.grokmesh_instruction_set.restype = ctypes.c_char_p
    native.grokmesh_use.restype = ctypes.c_bool
    native.grokmesh_join.restype = ctypes.c_bool
    for size in (native.grokmesh_region_bytes, native.grokmesh_nonce_offset, native.grokmesh_processors_offset):
        size.restype = ctypes.c_int64
    return native
