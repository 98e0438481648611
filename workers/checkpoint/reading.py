"""Reads parts of arrays from files: only the bytes that are wanted, many at a time, straight to where they belong."""

from __future__ import annotations

import concurrent.futures
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from workers.checkpoint.storage import Location, ObjectPath, read_into
from workers.checkpoint.tensor_file import ArraySpan

Array = np.ndarray[Any, np.dtype[Any]]
#: First and end of each dimension.
Bounds = tuple[tuple[int, int], ...]

#: Most bytes of a request: enough to be fast, few enough that a mistake costs little and memory is bounded.
REQUEST_BYTES = 8 << 20
#: Shorter stretches are not worth a request of their own: what lies between them is read too, and thrown away.
_WORTH = {True: 1 << 20, False: 4096}  # of an object store, of a disk
#: Requests at a time, of all tensors together.
THREADS = 16

_POOL = concurrent.futures.ThreadPoolExecutor(THREADS, "read")


def read_slice(
    location: Location, span: ArraySpan, bounds: Bounds, report: Callable[[int], None] = lambda _: None
) -> Array:
    """The part `bounds` of an array in a file, as an array of its own; `report` is told of bytes as they come.

    Raises OSError.
    """
    shape = tuple(stop - start for start, stop in bounds)
    out = np.empty(shape, span.dtype)
    flat = out.reshape(-1).view(np.uint8)
    jobs = list(_jobs(span, bounds, _WORTH[isinstance(location, ObjectPath)]))

    def run(job: tuple[int, int, int, int, int]) -> None:
        start, count, length, stride, target = job
        if count == 1:
            read_into(location, start, flat[target : target + length].data)
        else:
            scratch = np.empty((count - 1) * stride + length, np.uint8)
            read_into(location, start, scratch.data)
            rows = np.lib.stride_tricks.as_strided(scratch, (count, length), (stride, 1), writeable=False)
            flat[target : target + count * length].reshape(count, length)[:] = rows
        report(count * length)

    if len(jobs) == 1:
        run(jobs[0])
    else:
        list(_POOL.map(run, jobs))
    return out


def _jobs(span: ArraySpan, bounds: Bounds, worth: int) -> Iterator[tuple[int, int, int, int, int]]:
    """What to read: (place in the file, stretches, bytes of each, bytes from one to the next, place in the result)."""
    size, shape = span.dtype.itemsize, span.shape
    strides = [size * math.prod(shape[i + 1 :]) for i in range(len(shape))]
    # The dimensions from `whole` on are wanted as they are: they lie in one stretch for each place in those before.
    whole = len(shape)
    while whole and bounds[whole - 1] == (0, shape[whole - 1]):
        whole -= 1
    inner = max(whole - 1, 0)
    first, end = bounds[inner] if shape else (0, 1)
    length = (end - first) * (strides[inner] if shape else size)
    base = span.offset + (first * strides[inner] if shape else 0)
    outer = [range(*pair) for pair in bounds[:inner]]
    target = 0
    # Stretches of the last dimension before `inner` follow each other at one distance; those may be read together.
    rows = outer.pop() if outer else range(1)
    stride = strides[inner - 1] if inner else 0
    together = 1 if length >= worth or stride > 64 * length else max(1, REQUEST_BYTES // max(stride, 1))
    for places in np.ndindex(*(len(r) for r in outer)):
        start = base + sum(outer[i][place] * strides[i] for i, place in enumerate(places))
        for row in range(0, len(rows), together):
            count = min(together, len(rows) - row)
            at = start + rows[row] * stride
            if count > 1:
                yield at, count, length, stride, target
            else:
                for offset in range(0, length, REQUEST_BYTES):
                    yield at + offset, 1, min(REQUEST_BYTES, length - offset), 0, target + offset
            target += count * length
