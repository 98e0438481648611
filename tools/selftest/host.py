"""Devices, drivers, memory and interconnect, of one host or of all that form a mesh: `python -m tools.selftest.host`."""

from __future__ import annotations

import argparse
import functools
import importlib.metadata
import itertools
import os
import pathlib
import re
import shutil
import sys
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from tools.bench import limits
from tools.bench.slice import kernels_of, read_bandwidth
from tools.selftest.findings import Finding, Outcome
from tools.selftest.sections import SECRET
from workers.capacity.hardware import Device, Hardware, device_of
from workers.capacity.prediction import sum_seconds
from workers.host.environment import bypass_proxies
from workers.host.rendezvous import meet
from workers.kernels.cpu.bindings import NativeKernelsError
from workers.kernels.cpu.kernels import native_kernels
from workers.kernels.interface import PORTABLE, Kernels, Site
from workers.model.config import GrokConfig
from workers.model.partition import Partition
from workers.runtime.mesh import all_devices, make_mesh

#: Bytes of which bandwidths are measured, and of sums over devices: what a decode step has, and a prompt's chunk.
_READ, _COPIED = 2 << 30, 256 << 20
#: With how many are timed together, as starting a program takes longer than a small sum.
SUMS = {1 << 16: 32, 1 << 26: 2}
#: Shares of what the makers promise below which something is amiss, and times the planner's figure above which.
_LEAST_BANDWIDTH, _LEAST_MEMORY, _MOST_SECONDS = 0.8, 0.95, 2.0
_JOIN_SECONDS = 120
_PACKAGES = ("jax", "jaxlib", "jax-cuda13-plugin", "jax-cuda12-plugin", "libtpu", "ray")


def host() -> Iterator[Finding]:
    """What this host has, and what its memory does."""
    all_devices()
    devices = jax.local_devices()
    known = device_of(devices[0].device_kind)
    yield _software(devices[0].platform)
    yield _machine()
    yield Finding(
        "host", "devices", Outcome.OK, f"{len(devices)} x {devices[0].device_kind}", {"devices": len(devices)}
    )
    if devices[0].platform == "cpu":
        rate = limits.read_bandwidth()
        yield Finding("host", "memory, read", Outcome.OK, f"{rate / 1e9:.1f} GB/s by all threads", {"bandwidth": rate})
        return
    for device in devices:
        with jax.default_device(device):
            yield _memory(device, known)
            yield _bandwidth(device, known)
            yield _copies(device)


def _software(platform: str) -> Finding:
    found = [f"Python {sys.version.split()[0]}"]
    for package in _PACKAGES:
        try:
            found.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    driver = pathlib.Path("/proc/driver/nvidia/version")
    if driver.exists() and (version := re.search(r"\s(\d+\.\d+(\.\d+)?)\s", driver.read_text())):
        found.append(f"driver {version[1]}")
    outcome = Outcome.OK
    if platform == "cpu":
        try:
            found.append(f"kernels for {native_kernels().name}")
        except NativeKernelsError as error:
            outcome, found = Outcome.SLOW, [*found, f"plain JAX, many times slower: {error}"]
    return Finding("host", "software", outcome, ", ".join(found))


def _machine() -> Finding:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    shared = shutil.disk_usage("/dev/shm").free
    text = f"{os.cpu_count()} CPUs, {memory / 1e9:.0f} GB of memory, {shared / 1e9:.0f} GB free in /dev/shm"
    return Finding("host", "machine", Outcome.OK, text, {"memory": memory, "shared_memory": shared})


def _memory(device: jax.Device, known: Device | None) -> Finding:
    stats = device.memory_stats() or {}
    usable = float(stats.get("bytes_limit", 0))
    text = f"{usable / 1e9:.1f} GB for programs"
    outcome = Outcome.OK
    if known is not None and usable < _LEAST_MEMORY * known.memory:
        outcome, text = (
            Outcome.SLOW,
            f"{text}; the planner takes {known.memory / 1e9:.1f}: does another process hold some?",
        )
    return Finding("host", f"device {device.id}, memory", outcome, text, {"memory": usable})


def _bandwidth(device: jax.Device, known: Device | None) -> Finding:
    rate = read_bandwidth(_READ)
    text, outcome = f"{rate / 1e9:.0f} GB/s read", Outcome.OK
    if known is not None:
        text += f", {rate / known.bandwidth:.0%} of the {known.bandwidth / 1e9:.0f} promised"
        outcome = Outcome.OK if rate >= _LEAST_BANDWIDTH * known.bandwidth else Outcome.SLOW
    return Finding("host", f"device {device.id}, bandwidth", outcome, text, {"bandwidth": rate})


def _copies(device: jax.Device) -> Finding:
    array = np.ones(_COPIED // 4, np.float32)
    there = limits.best_of(lambda: jax.device_put(array, device).block_until_ready())
    held = jax.device_put(array, device)
    back = limits.best_of(lambda: np.asarray(held + 1))
    rates = {"to_device": _COPIED / there, "from_device": _COPIED / back}
    text = f"{rates['to_device'] / 1e9:.1f} GB/s to it, {rates['from_device'] / 1e9:.1f} back"
    return Finding("host", f"device {device.id}, copies", Outcome.OK, text, rates)


def sums(hosts: int, kernels: Kernels) -> Iterator[Finding]:
    """Sums over all devices of all hosts, each of which must call this alike, as an engine with these kernels has them."""
    count, known = jax.device_count(), device_of(jax.devices()[0].device_kind)
    if count == 1:
        return
    mesh = make_mesh(1, count)
    partition, axes = Partition.create(GrokConfig(), mesh, "tensor", kernels), mesh.axis_names
    split = NamedSharding(mesh, PartitionSpec(axes))

    @functools.partial(jax.jit, static_argnums=0, out_shardings=split)
    def numbers(size: int) -> jax.Array:
        return jnp.broadcast_to(jnp.arange(1.0, count + 1)[:, None], (count, size // 4))

    def means(times: int, x: jax.Array) -> jax.Array:
        found: jax.Array = jax.lax.fori_loop(
            0, times, lambda _, value: partition.sum(value, axes, Site.PROBE) / count, x
        )
        return found

    for size, times in SUMS.items():
        x, mean = numbers(size), functools.partial(means, times)
        total = jax.jit(partition.on_parts(mean, split.spec, split.spec))
        right = all((np.asarray(shard.data) == (count + 1) / 2).all() for shard in total(x).addressable_shards)
        seconds = limits.best_of(lambda total=total, x=x: total(x).block_until_ready()) / times  # type: ignore[misc]
        rate = 2 * size * (count - 1) / count / seconds
        name = f"sum of {size >> 10:,} KiB over {count} devices"
        text = f"{seconds * 1e6:,.0f} us, {rate / 1e9:.2f} GB/s a device"
        outcome = Outcome.OK if right else Outcome.FAILED
        if not right:
            text = f"the sum is wrong; {text}"
        elif known is not None:
            expected = sum_seconds(Hardware(known, hosts, count), count, size)
            text += f"; the planner expects {expected * 1e6:,.0f} us"
            outcome = Outcome.OK if seconds <= _MOST_SECONDS * expected else Outcome.SLOW
        yield Finding(
            "host" if hosts == 1 else "interconnect", name, outcome, text, {"seconds": seconds, "bytes": size}
        )


def main() -> int:
    """Of one host, all; of several, sums over their devices alone, which the first one prints."""
    parser = argparse.ArgumentParser(prog="python -m tools.selftest.host")
    parser.add_argument("--coordinator", default="")
    parser.add_argument("--rank", type=int, default=0)
    parser.add_argument("--hosts", type=int, default=1)
    arguments = parser.parse_args()
    if arguments.hosts > 1:
        bypass_proxies([arguments.coordinator.rpartition(":")[0]], os.environ)
        jax.distributed.initialize(
            arguments.coordinator, arguments.hosts, arguments.rank, cluster_detection_method="deactivate",
            initialization_timeout=_JOIN_SECONDS,
        )  # fmt: skip
    try:
        kernels = kernels_of(all_devices()[0])
    except NativeKernelsError:
        kernels = PORTABLE
    if arguments.hosts > 1 and kernels.collectives is not None:
        meet(arguments.coordinator, arguments.rank, os.environ[SECRET].encode(), _JOIN_SECONDS, _JOIN_SECONDS)
    for finding in itertools.chain(host() if arguments.hosts == 1 else (), sums(arguments.hosts, kernels)):
        if arguments.rank == 0:
            finding.say()
    return 0


if __name__ == "__main__":
    sys.exit(main())
