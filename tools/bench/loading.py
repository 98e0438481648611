"""Loading a checkpoint beside reading its files, in turns, each in a process of its own with nothing cached (needs root).

python -m tools.bench.loading [--checkpoint build/bench/model] [--host-of 4]
"""

from __future__ import annotations

import argparse
import concurrent.futures
import json
import os
import pathlib
import re
import statistics
import subprocess
import sys
import time
from typing import Any

import numpy as np

from tools.bench.checkpoint import make_checkpoint
from workers.checkpoint.checkpoint import open_checkpoint
from workers.checkpoint.reading import REQUEST_BYTES, THREADS
from workers.checkpoint.storage import read_into


def main() -> int:
    """Prints rates, their ratios, and the memory beside what was loaded."""
    parser = argparse.ArgumentParser(prog="python -m tools.bench.loading")
    parser.add_argument("--checkpoint", type=pathlib.Path, default=pathlib.Path("build/bench/model"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--run", choices=("raw", "plain", "native"), help="only this, in this process; prints JSON")
    arguments = parser.parse_args()
    if arguments.run:
        print(json.dumps(_raw(arguments.checkpoint) if arguments.run == "raw" else _load(arguments)))
        return 0
    make_checkpoint(arguments.checkpoint)
    results: dict[str, list[dict[str, float]]] = {"raw": [], "plain": [], "native": []}
    for _ in range(arguments.rounds):
        for kind, found in results.items():
            os.sync()
            pathlib.Path("/proc/sys/vm/drop_caches").write_text("3")
            command = [
                sys.executable,
                "-m",
                "tools.bench.loading",
                "--run",
                kind,
                "--checkpoint",
                str(arguments.checkpoint),
            ]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            found.append(json.loads(done.stdout.splitlines()[-1]))
    raw = statistics.median(found["rate"] for found in results["raw"])
    print(f"{'':<34} {'GB/s':>6} {'of raw':>7} {'extra memory':>13}")
    names = {"raw": "reading the files", "plain": "loading, plain JAX", "native": "loading, packed for the CPU kernels"}
    for kind, found in results.items():
        rate = statistics.median(one["rate"] for one in found)
        extra = statistics.median(one["extra"] for one in found)
        print(f"{names[kind]:<34} {rate / 1e9:>6.2f} {rate / raw:>7.0%} {extra:>13.1%}")
    return 0


def _touch(directory: pathlib.Path) -> None:
    """Has a virtual machine's memory backed by its host, which else gives each page when it is first used: the files' pages in
    the system's cache, what is read and what is made of it; at most half of what is free."""
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    size = 4 * sum(path.stat().st_size for path in (directory / "ckpt-0").iterdir())
    np.empty(min(size, free // 2), np.uint8)[::4096] = 1


def _raw(directory: pathlib.Path) -> dict[str, float]:
    """All bytes of all files, many at a time, thrown away."""
    _touch(directory)
    jobs = [
        (path, start, min(REQUEST_BYTES, path.stat().st_size - start))
        for path in sorted((directory / "ckpt-0").iterdir())
        for start in range(0, path.stat().st_size, REQUEST_BYTES)
    ]

    def read(job: tuple[pathlib.Path, int, int]) -> int:
        path, start, length = job
        read_into(path, [(start, np.empty(length, np.uint8).data)])
        return length

    began = time.perf_counter()
    with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
        total = sum(pool.map(read, jobs))
    return {"rate": total / (time.perf_counter() - began), "extra": 0.0}


def _load(arguments: argparse.Namespace) -> dict[str, float]:
    import jax

    jax.config.update("jax_platforms", "cpu")
    from workers.checkpoint.loader import load_parameters
    from workers.kernels.cpu.kernels import native_kernels
    from workers.kernels.interface import PORTABLE
    from workers.model.partition import Partition
    from workers.runtime.mesh import make_mesh

    def memory(name: str) -> int:
        found: Any = re.search(name + r":\s+(\d+) kB", pathlib.Path("/proc/self/status").read_text())
        return int(found[1]) * 1024

    checkpoint = open_checkpoint(arguments.checkpoint)
    kernels = PORTABLE if arguments.run == "plain" else native_kernels()
    partition = Partition.create(checkpoint.config, make_mesh(1, 1), "tensor", kernels)
    jax.block_until_ready(jax.device_put(1.0))
    _touch(arguments.checkpoint)
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # the peak starts from here
    before = memory("VmRSS")
    began = time.perf_counter()
    params, progress = load_parameters(checkpoint, partition)
    seconds = time.perf_counter() - began
    kept = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    return {"rate": progress.read / seconds, "extra": (memory("VmHWM") - before - kept) / kept}


if __name__ == "__main__":
    sys.exit(main())
