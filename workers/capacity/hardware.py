"""What accelerators and hosts there are, and what they can do. Makers' figures, but of memory what a program can use."""

from __future__ import annotations

import dataclasses
import math
import re

GIB = 2**30
#: Of a CPU host's memory, what is left for a worker by the system, Ray and Python.
CPU_SHARE = 0.9


class HardwareError(ValueError):
    """Hardware that does not exist, or is described in a way that says too little."""


@dataclasses.dataclass(frozen=True)
class Device:
    """One device: a TPU chip, a GPU, or all cores that a worker process on a CPU host computes with.

    Attributes:
      name: as people call it.
      platform: `tpu`, `gpu` or `cpu`.
      memory: bytes that programs can use.
      bandwidth: bytes a second from that memory.
      flops: operations a second: bfloat16 products on accelerators, those of its own kernels on a CPU.
      link: bytes a second to other devices of the host or slice, one way.
      link_seconds: of the smallest sum over these devices.
      network: bytes a second to devices of other hosts (or slices), one way.
      network_seconds: of the smallest sum over hosts.
      per_host: devices of a host, where a host is not the whole slice.
    """

    name: str
    platform: str
    memory: float
    bandwidth: float
    flops: float
    link: float
    link_seconds: float
    network: float
    network_seconds: float
    per_host: int


def _tpu(name: str, gib: float, bandwidth: float, teraflops: float, link: float) -> Device:
    # Within a slice hosts do not matter: all chips are on one interconnect.
    return Device(name, "tpu", gib * GIB, bandwidth * 1e9, teraflops * 1e12, link * 1e9, 8e-6, link * 1e9, 8e-6, 4)


def _gpu(name: str, gigabytes: float, bandwidth: float, teraflops: float, link: float) -> Device:
    # A tenth stays with CUDA, NCCL and fragments; hosts are linked by 400 Gbit/s a GPU.
    return Device(
        name, "gpu", gigabytes * 1e9 * 0.9, bandwidth * 1e9, teraflops * 1e12, link * 1e9, 15e-6, 50e9, 40e-6, 8
    )


#: TPUs: https://cloud.google.com/tpu/docs and, for the links, https://jax-ml.github.io/scaling-book/tpus; usable memory is what
#: libtpu's compiler allows. GPUs: NVIDIA's data sheets of the SXM modules.
DEVICES = {
    device.name: device
    for device in (
        _tpu("v4", 30.75, 1228, 275, 90),
        _tpu("v5e", 15.75, 819, 197, 90),
        _tpu("v5p", 95.74, 2765, 459, 180),
        _tpu("v6e", 31.25, 1640, 918, 180),
        _gpu("A100", 80, 2039, 312, 300),
        _gpu("H100", 80, 3350, 989, 450),
        _gpu("H200", 141, 4800, 989, 450),
        _gpu("B200", 180, 8000, 2250, 900),
    )
}

#: How JAX calls TPUs whose name differs from ours.
_KINDS = {"TPU v5 lite": "v5e", "TPU v5": "v5p", "TPU v6 lite": "v6e"}

#: Slices that can be had, in chips along each dimension.
TOPOLOGIES = {
    "v5e": ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16"),
    "v6e": ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16"),
    "v4": ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8"),
    "v5p": ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8"),
}


def device_of(kind: str) -> Device | None:
    """The device that JAX calls so, such as `NVIDIA H100 80GB HBM3`; None if it is not known."""
    name = _KINDS.get(kind)
    return DEVICES[name] if name else next((d for d in DEVICES.values() if d.name in re.split(r"[ -]", kind)), None)


@dataclasses.dataclass(frozen=True)
class Hardware:
    """What a replica would run on.

    Attributes:
      device: of which kind all devices are.
      hosts: worker processes.
      devices: of all hosts.
      topology: of a TPU slice, such as `4x4`.
    """

    device: Device
    hosts: int
    devices: int
    topology: str | None = None

    def __str__(self) -> str:
        """As the command line names it."""
        if self.topology:
            return f"{self.device.name}:{self.topology}"
        if self.device.platform == "cpu":
            return f"{self.hosts} x {self.device.name}"
        return f"{self.hosts} x {self.devices // self.hosts}x{self.device.name}"


def tpu_slice(text: str) -> Hardware:
    """The hardware of `v6e:4x4`. Raises HardwareError, naming what there is."""
    name, _, topology = text.partition(":")
    known = TOPOLOGIES.get(name)
    if known is None:
        raise HardwareError(f"--topology {text}: unknown kind of TPU; use {', '.join(TOPOLOGIES)}")
    if topology not in known:
        raise HardwareError(f"--topology {text}: no such slice; {name} comes as {', '.join(known)}")
    chips = math.prod(int(size) for size in topology.split("x"))
    device = DEVICES[name]
    # v5e and v6e have hosts of 8 chips too, and Ray takes a slice of 8 for one of these.
    hosts = 1 if name in ("v5e", "v6e") and chips == 8 else max(1, chips // device.per_host)
    return Hardware(device, hosts, chips, topology)


def gpu_hosts(text: str, hosts: int) -> Hardware:
    """The hardware of `hosts` hosts with `8xH100` each. Raises HardwareError."""
    match = re.fullmatch(r"(\d+)x(\w+)", text)
    device = DEVICES.get(match[2]) if match else None
    if not match or device is None or device.platform != "gpu" or not int(match[1]):
        known = ", ".join(device.name for device in DEVICES.values() if device.platform == "gpu")
        raise HardwareError(f"--gpus {text}: expected a number and a kind, such as 8xH100; kinds are {known}")
    return Hardware(device, hosts, hosts * int(match[1]))


def cpu_hosts(memory: float, bandwidth: float, flops: float, hosts: int, network: float = 1.25e9) -> Hardware:
    """`hosts` CPU hosts of so many bytes, bytes a second, operations a second, and bytes a second between them.

    A sum takes 12 us in memory and 32 over TCP between namespaces (`tools.bench.collectives`); a network adds its own.
    """
    name = f"{memory / 1e9:.0f} GB"
    device = Device(name, "cpu", memory * CPU_SHARE, bandwidth, flops, bandwidth, 12e-6, network, 100e-6, 1)
    return Hardware(device, hosts, hosts)


def pod_type(text: str) -> Hardware | None:
    """The hardware of a Ray pod type such as `v6e-16`; None if it is not known."""
    name, _, count = text.partition("-")
    name = {"v5litepod": "v5e"}.get(name, name)
    if name not in TOPOLOGIES or not count.isdecimal():
        return None
    chips = int(count) // (2 if name in ("v4", "v5p") else 1)  # those are counted in cores
    fitting = [t for t in TOPOLOGIES[name] if math.prod(int(size) for size in t.split("x")) == chips]
    return tpu_slice(f"{name}:{fitting[0]}") if fitting else None
