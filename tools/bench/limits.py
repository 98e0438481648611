"""What this machine can do at best, measured now: the yardstick of the engine's figures."""

from __future__ import annotations

import concurrent.futures
import os
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

#: Bytes that are read; many times what any cache holds.
_BYTES = 512 << 20
_SIZE = 2048


def best_of(action: Callable[[], object], times: int = 5) -> float:
    """Seconds of the fastest of some times, after one that does not count."""
    action()
    seconds = []
    for _ in range(times):
        began = time.perf_counter()
        action()
        seconds.append(time.perf_counter() - began)
    return min(seconds)


def read_bandwidth(rounds: int = 5) -> float:
    """Bytes a second that all threads together read from memory; the best of some rounds."""
    parts = np.array_split(np.ones(_BYTES // 4, np.float32), os.cpu_count() or 1)
    with concurrent.futures.ThreadPoolExecutor(len(parts)) as pool:
        return _BYTES / best_of(lambda: list(pool.map(_read, parts)), rounds)


def _read(part: np.ndarray[tuple[int], np.dtype[np.float32]]) -> float:
    half = part.size // 2
    return float(np.dot(part[:half], part[half : 2 * half]))


def matmul_peak(rounds: int = 8) -> float:
    """Floating-point operations a second of XLA's float32 matrix product; the best of some rounds."""
    x = jnp.ones((_SIZE, _SIZE))
    multiply = jax.jit(jnp.matmul)

    return 2 * _SIZE**3 / best_of(lambda: multiply(x, x).block_until_ready(), rounds)
