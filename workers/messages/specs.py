"""What the supervisor tells a host when it joins an epoch's mesh."""

from __future__ import annotations

import dataclasses

#: The phases of a host that is to join a mesh, in their order after "starting". While one reads its part of the checkpoint it
#: also compiles.
PREPARING, JOINING, LOADING = "preparing", "joining the mesh", "loading and compiling"
COMPILING, WARMING_UP = "compiling", "warming up"


@dataclasses.dataclass(frozen=True)
class ModelSpec:
    """What to load, and how to compute with it.

    Attributes:
      checkpoint: directory, as the host sees it.
      weights: how weights are kept on the devices; see `cluster.config.ModelSection`.
      activations: `float32` or `bfloat16`.
      kv_cache: `float32`, `bfloat16` or `int8`; None for that of the activations.
    """

    checkpoint: str
    weights: str
    activations: str
    kv_cache: str | None = None


@dataclasses.dataclass(frozen=True)
class MeshSpec:
    """The mesh of a replica.

    Attributes:
      platform: `cpu`, `gpu` or `tpu`.
      hosts: processes.
      devices_per_host: CPU devices to make in each process; other platforms show what they have.
      data, model: sizes of the mesh's axes.
      rules: a key of `workers.model.layout.RULES`.
    """

    platform: str
    hosts: int
    devices_per_host: int
    data: int
    model: int
    rules: str


@dataclasses.dataclass(frozen=True)
class EngineSpec:
    """Sizes of the engine; see `workers.messages.plan.EngineShape`.

    Attributes:
      context: None for the model's own.
      kv_pages: pages over all groups; None for as many as all slots can fill.
      max_waiting: requests that may wait for a slot.
      steps_per_plan: most tokens of a sequence that one plan samples when no request waits.
      prefill_slowdown: how many times as long a step may take when it computes prompts too.
    """

    slots: int
    page_size: int
    prefill_chunk: int
    context: int | None
    kv_pages: int | None
    max_waiting: int
    steps_per_plan: int = 1
    prefill_slowdown: float = 3.0


@dataclasses.dataclass(frozen=True)
class RankSpec:
    """A host's place in an epoch.

    Attributes:
      replica: number of the replica.
      epoch: number of this forming of the mesh.
      secret: of the epoch; what connects to the leader must know it.
      rank: of this host; 0 leads.
      coordinator: `host:port` where JAX's coordination service listens, on rank 0.
      leader: `host:port` where the leader listens; empty for nowhere.
      compilation_cache: directory of compiled programs kept between starts, or None.
      silence_seconds: see `cluster.config.ClusterSection`.
      stall_seconds: see `cluster.config.TelemetrySection`.
    """

    replica: int
    epoch: int
    secret: bytes = dataclasses.field(repr=False)
    rank: int
    coordinator: str
    leader: str
    model: ModelSpec
    mesh: MeshSpec
    engine: EngineSpec
    compilation_cache: str | None
    silence_seconds: float = 1.5
    stall_seconds: float | None = None


@dataclasses.dataclass(frozen=True)
class Endpoint:
    """Where a host can be reached, told before it joins a mesh.

    Attributes:
      address: in the cluster.
      pid: of the worker process.
      node: id of the Ray node.
      coordinator_port, leader_port: free ports, for the case that it becomes rank 0.
      metrics_port: of its Prometheus endpoint.
      code: digest of the code that it runs.
    """

    address: str
    pid: int
    node: str
    coordinator_port: int
    leader_port: int
    metrics_port: int
    code: str


@dataclasses.dataclass(frozen=True)
class Progress:
    """What a host is doing.

    Attributes:
      phase: in words.
      fraction: of the phase, 0 to 1.
      devices: local devices, once known.
      bytes_read: of the checkpoint.
      bytes_total: that this host reads in all.
      bytes_per_second: while it reads.
    """

    phase: str
    fraction: float
    devices: int = 0
    bytes_read: int = 0
    bytes_total: int = 0
    bytes_per_second: float = 0.0

    @property
    def loading(self) -> str:
        """How far reading the checkpoint has come, for a reader."""
        return describe_loading(self.bytes_read, self.bytes_total, self.bytes_per_second)


def describe_loading(read: int, total: int, per_second: float) -> str:
    """A bar, bytes, bytes a second and the time left."""
    done = 20 * read // max(total, 1)
    text = f"[{'#' * done}{'.' * (20 - done)}] {read / 1e9:.2f} of {total / 1e9:.2f} GB"
    if per_second and read < total:
        text += f", {per_second / 1e9:.2f} GB/s, {(total - read) / per_second:.0f} s left"
    return text
