"""Reads parts of arrays from files: only the bytes that are wanted, many at a time, straight to where they belong."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator

import numpy as np

from workers.checkpoint.storage import Location, ObjectPath, read_into
from workers.checkpoint.tensor_file import ArraySpan
from workers.kernels.packing import Array, empty

#: First and end of each dimension.
Bounds = tuple[tuple[int, int], ...]

#: Most bytes of a request: enough to be fast, few enough that a mistake costs little and memory is bounded.
REQUEST_BYTES = 8 << 20
#: Shorter stretches are not worth a request of their own: what lies between them is read too, and thrown away.
_WORTH = {True: 1 << 20, False: 4096}  # of an object store, of a disk
#: Requests at a time, of all tensors together.
THREADS = 16

#: Most bytes of scratch memory that are kept from one tensor to the next.
_KEPT = 256 << 20

_POOL = concurrent.futures.ThreadPoolExecutor(THREADS, "read")


@dataclasses.dataclass(frozen=True)
class _Job:
    """Stretches of a file that follow each other at one distance, and where they belong in the result, one after the other."""

    start: int
    count: int
    length: int
    stride: int
    target: int


class Scratch:
    """Memory for what is read and soon made into something else. New memory from the system costs more than a copy."""

    def __init__(self) -> None:
        self._whole = empty((0,), np.uint8)
        self._taken = 0

    def take(self, size: int) -> Array:
        """[size] bytes, which begin at a multiple of 64."""
        first = self._taken
        self._taken += -(-size // 64) * 64
        return self._whole[first : first + size] if self._taken <= self._whole.size else empty((size,), np.uint8)

    def clear(self) -> None:
        """Takes all back. Next time there will be room for as much, unless it is very much."""
        if self._whole.size < self._taken <= _KEPT:
            self._whole = empty((self._taken,), np.uint8)
        self._taken = 0


def read_slice(
    location: Location,
    span: ArraySpan,
    bounds: Bounds,
    report: Callable[[int], None] = lambda _: None,
    scratch: Scratch | None = None,
) -> Array:
    """The part `bounds` of an array in a file, as an array of its own, or in `scratch`; `report` is called with numbers of
    bytes as they come.

    Raises OSError.
    """
    shape = tuple(stop - start for start, stop in bounds)
    flat = (scratch or Scratch()).take(math.prod(shape) * span.dtype.itemsize)
    worth = _WORTH[isinstance(location, ObjectPath)]

    def run(job: _Job) -> None:
        taken = flat[job.target : job.target + job.count * job.length]
        if job.length >= worth or job.count == 1:
            pieces = (
                (job.start + i * job.stride, taken[i * job.length : (i + 1) * job.length].data)
                for i in range(job.count)
            )
            read_into(location, pieces)
        else:
            spread = np.empty((job.count - 1) * job.stride + job.length, np.uint8)
            read_into(location, [(job.start, spread.data)])
            rows = np.lib.stride_tricks.as_strided(spread, (job.count, job.length), (job.stride, 1), writeable=False)
            taken.reshape(job.count, job.length)[:] = rows
        report(taken.size)

    jobs = list(_jobs(span, bounds))
    if len(jobs) == 1:
        run(jobs[0])
    else:
        list(_POOL.map(run, jobs))
    return flat.view(span.dtype).reshape(shape)


def _jobs(span: ArraySpan, bounds: Bounds) -> Iterator[_Job]:
    """What to read, none more than about REQUEST_BYTES of the file."""
    shape, size = span.shape, span.dtype.itemsize
    strides = [size * math.prod(shape[i + 1 :]) for i in range(len(shape))]
    # The dimensions from `whole` on are wanted as they are, so that each stretch spans them and a part of the one before.
    whole = len(shape)
    while whole and bounds[whole - 1] == (0, shape[whole - 1]):
        whole -= 1
    inner = max(whole - 1, 0)
    length = (bounds[inner][1] - bounds[inner][0]) * strides[inner] if shape else size
    # Those of the dimension before follow each other at one distance.
    count = bounds[inner - 1][1] - bounds[inner - 1][0] if inner else 1
    stride = strides[inner - 1] if inner else 0
    first = span.offset + sum(strides[i] * bounds[i][0] for i in range(inner + 1 if shape else 0))
    target = 0
    for places in np.ndindex(*(stop - start for start, stop in bounds[: max(inner - 1, 0)])):
        start = first + sum(place * strides[i] for i, place in enumerate(places))
        if count == 1 or length > REQUEST_BYTES:
            for row, offset in itertools.product(range(count), range(0, length, REQUEST_BYTES)):
                size = min(REQUEST_BYTES, length - offset)
                yield _Job(start + row * stride + offset, 1, size, 0, target + row * length + offset)
        else:
            together = max(1, REQUEST_BYTES // stride)
            for row in range(0, count, together):
                part = min(together, count - row)
                yield _Job(start + row * stride, part, length, stride, target + row * length)
        target += count * length
