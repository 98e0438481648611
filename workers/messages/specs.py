"""What a mesh is made of, and what a host gets when it joins one. Parts of it stand in `ray_config.yaml`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Annotated

from workers.messages.constraints import AbsolutePath, AtLeast, OneOf

PLATFORMS = ("cpu", "gpu", "tpu")
WEIGHTS = ("int4", "int8", "int8-unrounded", "bfloat16", "float32")
ACTIVATIONS = ("float32", "bfloat16")
KV_CACHES = (*ACTIVATIONS, "int8")

#: The phases of a host that is to join a mesh, in their order after "starting". While one reads its part of the checkpoint it
#: also compiles.
PREPARING, JOINING, LOADING = "preparing", "joining the mesh", "loading and compiling"
COMPILING, WARMING_UP, READY = "compiling", "warming up", "ready"


@dataclasses.dataclass(frozen=True)
class ModelSpec:
    """What is served.

    Attributes:
      name: by which clients know it.
      checkpoint: directory with ckpt-0/ and tokenizer.model, the same path on every host, relative to this file; or the URL of
        one in an object store, such as s3://bucket/grok-1.
      weights: int8 (as released, and rounded to bfloat16 when scaled, as xAI's code does), bfloat16 or float32; on CPU hosts
        also int8-unrounded: up to half as fast again in batches and prompts, while logits move by half a percent of their
        spread, which is less than what bfloat16 activations move them. int4: half the memory, in groups of 128 rows; see
        docs/capacity.md for what it costs.
      activations: float32 or bfloat16.
      kv_cache: float32, bfloat16 or int8: how keys and values are kept; as activations if absent. int8 has a scale for each
        position of a head; on CPU hosts the fast kernels do not know it.
      weights_cache: directory on each host, such as /dev/shm/grokmesh, in which it keeps its part of the weights as its kernels
        read them, for the next epoch and the next start of the service; nothing is kept if absent. In memory it takes no
        more of it on CPU hosts, and as much as the devices' weights on others. `grokmesh stop --forget` removes it, and so
        does each host ten minutes after Ray has ended there.
    """

    name: str
    checkpoint: str
    weights: Annotated[str, OneOf(WEIGHTS)] = "int8"
    activations: Annotated[str, OneOf(ACTIVATIONS)] = "float32"
    kv_cache: Annotated[str | None, OneOf(KV_CACHES)] = None
    weights_cache: Annotated[str | None, AbsolutePath()] = None

    @property
    def numbers(self) -> tuple[str | None, ...]:
        """What decides which tokens come: a request can go on only where this is the same."""
        return self.checkpoint, self.weights, self.activations, self.kv_cache


@dataclasses.dataclass(frozen=True)
class MeshSpec:
    """The device mesh of each replica.

    Attributes:
      platform: cpu, gpu or tpu.
      hosts: worker processes, each on a host of its own.
      devices_per_host: devices of each; of CPU hosts, parts into which a process divides its processors.
      data, model: sizes of the mesh's axes; data * model = hosts * devices_per_host.
      rules: how the model lies on it: tensor, batch or xai.
      smallest: hosts with which a replica goes on if others are lost and none can take their places, as long as the model fits;
        if absent, it waits until there are as many as `hosts` again.
    """

    platform: Annotated[str, OneOf(PLATFORMS)] = "cpu"
    hosts: Annotated[int, AtLeast(1)] = 1
    devices_per_host: Annotated[int, AtLeast(1)] = 1
    data: Annotated[int, AtLeast(1)] = 1
    model: Annotated[int, AtLeast(1)] = 1
    rules: str = "tensor"
    smallest: Annotated[int | None, AtLeast(1)] = None


@dataclasses.dataclass(frozen=True)
class EngineSpec:
    """Batching and the KV cache.

    Attributes:
      slots: sequences that decode together.
      page_size: positions of a KV page.
      prefill_chunk: prompt positions of one prefill call.
      context: longest sequence; the model's own if absent.
      kv_pages: KV pages over all batch groups, one of each for padding; if absent, as many as all slots can fill, or as memory
        has room for.
      max_waiting: requests that may wait for a slot.
      steps_per_plan: most tokens of a sequence that one dispatch samples while no request waits. More is less work for
        the leader, but tokens then come in bursts, and a cancelled request holds its slot for so long.
      prefill_slowdown: a step that computes prompts beside decoding may take so many times as long as one that does not. Less
        makes tokens come more evenly, more makes first tokens come sooner and the whole faster.
    """

    slots: Annotated[int, AtLeast(1)] = 16
    page_size: Annotated[int, AtLeast(1)] = 16
    prefill_chunk: Annotated[int, AtLeast(1)] = 64
    context: Annotated[int | None, AtLeast(1)] = None
    kv_pages: Annotated[int | None, AtLeast(1)] = None
    max_waiting: Annotated[int, AtLeast(1)] = 512
    steps_per_plan: Annotated[int, AtLeast(1)] = 1
    prefill_slowdown: Annotated[float, AtLeast(0)] = 3.0


@dataclasses.dataclass(frozen=True)
class WeightsAddress:
    """Where a host's weights cache can be read, by those that know the secret."""

    host: str
    port: int
    secret: str = dataclasses.field(repr=False)


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
      liveness: `host:port` of the process beside this host's worker that reports whether it lives; empty if there is none.
      silence_seconds: see `cluster.config.schema.ClusterSection`.
      stall_seconds, plan_log: see `cluster.config.schema.TelemetrySection`.
      group: name of the placement group that has reserved its host; empty without Ray.
      twins: weights caches of hosts of other replicas that are to hold the same part of the weights.
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
    liveness: str = ""
    silence_seconds: float = 1.5
    stall_seconds: float | None = None
    plan_log: str | None = None
    group: str = ""
    twins: tuple[WeightsAddress, ...] = ()


@dataclasses.dataclass(frozen=True)
class Endpoint:
    """Where a host can be reached, known before it joins a mesh.

    Attributes:
      address: in the cluster.
      pid: of the worker process.
      node: id of the Ray node.
      coordinator_port, leader_port: free ports, for the case that it becomes rank 0.
      metrics_port: of its Prometheus endpoint.
      code: digest of the code that it runs.
      liveness: see RankSpec.
      weights: of its weights cache; None if it has none.
      accelerators: the environment variables by which Ray assigns accelerators to it.
    """

    address: str
    pid: int
    node: str
    coordinator_port: int
    leader_port: int
    metrics_port: int
    code: str
    liveness: str = ""
    weights: WeightsAddress | None = None
    accelerators: Mapping[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Assignment:
    """What a worker is part of.

    Attributes:
      endpoint: of the worker.
      spec: its place in an epoch; None for one that stands by.
      digests: of the parts of the checkpoint that it has loaded, once it has.
      phase: see Progress.
    """

    endpoint: Endpoint
    spec: RankSpec | None
    digests: dict[str, int]
    phase: str


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
