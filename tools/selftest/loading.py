"""How fast a checkpoint's bytes come: `python -m tools.selftest.loading DIRECTORY_OR_URL`."""

from __future__ import annotations

import concurrent.futures
import os
import pathlib
import sys
import time

import numpy as np

from tools.selftest.findings import Finding, Outcome
from workers.checkpoint.checkpoint import open_checkpoint
from workers.checkpoint.reading import REQUEST_BYTES, THREADS
from workers.checkpoint.storage import Location, locate, read_into, size_of

#: Bytes that are read at most, and seconds after which no further request begins.
_MOST_BYTES, _SECONDS = 32 << 30, 20.0


def main() -> int:
    """Reads parts from all over the checkpoint's files, as many at a time as loading does."""
    checkpoint = open_checkpoint(locate(sys.argv[1]))
    jobs: list[tuple[Location, int, int]] = []
    for _, tensor in checkpoint.tensors:
        if isinstance(tensor.path, pathlib.Path):
            _forget(tensor.path)
        size = size_of(tensor.path)
        jobs += [(tensor.path, start, min(REQUEST_BYTES, size - start)) for start in range(0, size, REQUEST_BYTES)]
    chosen = [jobs[i] for i in np.random.default_rng(0).permutation(len(jobs))][: _MOST_BYTES // REQUEST_BYTES]
    began = time.perf_counter()

    def read(job: tuple[Location, int, int]) -> int:
        if time.perf_counter() - began > _SECONDS:
            return 0
        path, start, length = job
        read_into(path, [(start, np.empty(length, np.uint8).data)])
        return length

    with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
        total = sum(pool.map(read, chosen))
    seconds = time.perf_counter() - began
    rate = total / seconds
    whole = sum(length for _, _, length in jobs)
    text = (
        f"{rate / 1e9:.2f} GB/s, {total / 1e9:.1f} GB read; all {whole / 1e9:,.0f} GB would take {whole / rate:,.0f} s"
    )
    Finding("loading", sys.argv[1], Outcome.OK, text, {"rate": rate, "bytes": total, "seconds": seconds}).say()
    return 0


def _forget(path: pathlib.Path) -> None:
    """Has the system drop what it keeps of a file in memory."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


if __name__ == "__main__":
    sys.exit(main())
