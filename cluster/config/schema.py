"""The settings of `ray_config.yaml`, what each may be, and what must hold between them."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Iterator
from typing import Annotated

from workers.capacity.hardware import DEVICES
from workers.messages.constraints import AbsolutePath, AtLeast, Between, HostPort, MoreThan, OneOf
from workers.messages.specs import EngineSpec, MeshSpec, ModelSpec
from workers.model.config import GrokConfig
from workers.model.layout import RULES

GPUS = tuple(device.name for device in DEVICES.values() if device.platform == "gpu")


class ConfigError(ValueError):
    """A configuration that can't be used: `file:line: what is wrong; what to do`."""


@dataclasses.dataclass(frozen=True)
class ClusterSection:
    """The Ray cluster.

    Attributes:
      address: `local` starts one on this machine, with as many hosts as the replicas need; otherwise a Ray address.
      cpus_per_host: logical Ray CPUs that a worker takes.
      tpu_pod_type: of a platform of TPUs, Ray's name for the kind of slice that a replica takes whole, such as v6e-16.
      accelerator: of GPU hosts, their kind, such as H100: whether the model fits is then known before anything is started.
      memory_per_host: of CPU hosts, the GB that each has, for the same purpose; in a local cluster, this machine's, shared by
        its hosts, if absent.
      compilation_cache: directory on each host where compiled programs are kept; empty for none.
      silence_seconds: a host or a leader that has sent nothing for so long is suspected to be lost. They send something four
        times a second. It is lost if within two more seconds its host can't be reached, or its process is seen to be stopped
        or to do nothing; of CPU hosts that wait for each other in the middle of a step, without more ado.
    """

    address: str = "local"
    cpus_per_host: Annotated[int, AtLeast(1)] = 1
    tpu_pod_type: str | None = None
    accelerator: Annotated[str | None, OneOf(GPUS)] = None
    memory_per_host: Annotated[float | None, MoreThan(0)] = None
    compilation_cache: str = "~/.cache/grokmesh/xla"
    silence_seconds: Annotated[float, Between(0.5, 60)] = 1.5


@dataclasses.dataclass(frozen=True)
class AutoscalingSection:
    """When replicas are added and taken away.

    Attributes:
      max_replicas: the most; none are ever added if absent.
      queue_per_replica: queued requests per ready replica above which one is added.
      time_to_first_token: seconds; too long if the slowest tenth of the last minute's requests took more.
      up_seconds: how long it must be too much before a replica is added.
      down_seconds: how long half of the slots of one replica fewer must have sufficed before one is taken away.
    """

    max_replicas: Annotated[int | None, AtLeast(1)] = None
    queue_per_replica: Annotated[float, AtLeast(0)] = 8.0
    time_to_first_token: Annotated[float, AtLeast(0)] = 5.0
    up_seconds: Annotated[float, AtLeast(0)] = 10.0
    down_seconds: Annotated[float, AtLeast(0)] = 300.0


@dataclasses.dataclass(frozen=True)
class GatewaySection:
    """The gRPC server, and the HTTP one beside it.

    Attributes:
      address: where it listens.
      http_address: where the OpenAI-compatible HTTP interface listens; there is none if absent. Keys, limits and certificates
        are those of gRPC.
      processes: gateways on each of their hosts, which share the address.
      hosts: head: they run where the service was started; all: on every host of the Ray cluster.
      max_requests: requests that may be in one gateway at once; more are turned away.
      queue_seconds: a request that would likely wait longer for a slot, or longer than its deadline leaves, is turned away.
      max_message_bytes: of a client's message.
      drain_seconds: how long requests may go on after the service was asked to stop.
      failover_seconds: how long requests wait for a lost replica to be built again where no other serves. They go on then where
        they were, and their clients see nothing but a pause. If absent, at least two minutes, and a minute more than twice what
        the planner thinks that loading takes.
      api_keys: file of `name: SHA-256 of the key` lines, as `grokmesh key` makes them, or of names with scopes and limits;
        relative to this file. Without it every caller may complete prompts.
      share_prefixes: whether requests of one key may use what the prefix cache keeps of another's prompts. It is faster where
        keys ask alike, and lets one find out, by how long it waits, what another has asked.
      tls_certificate, tls_key: PEM files of the gateway's certificate chain and its key; without them nothing is encrypted. All
        files of keys and certificates are read again when they change.
      tls_client_ca: PEM file of the authority that signs clients' certificates; with it, clients without one are refused.
    """

    address: Annotated[str, HostPort()] = "127.0.0.1:50051"
    http_address: Annotated[str | None, HostPort()] = None
    processes: Annotated[int, AtLeast(1)] = 1
    hosts: Annotated[str, OneOf(("head", "all"))] = "head"
    max_requests: Annotated[int, AtLeast(1)] = 512
    queue_seconds: Annotated[float, AtLeast(0)] = 60.0
    max_message_bytes: Annotated[int, AtLeast(1)] = 4 * 1024 * 1024
    drain_seconds: Annotated[float, AtLeast(0)] = 10.0
    failover_seconds: Annotated[float | None, AtLeast(0)] = None
    api_keys: pathlib.Path | None = None
    share_prefixes: bool = False
    tls_certificate: pathlib.Path | None = None
    tls_key: pathlib.Path | None = None
    tls_client_ca: pathlib.Path | None = None


@dataclasses.dataclass(frozen=True)
class TelemetrySection:
    """Metrics, logs and traces.

    Attributes:
      address: HTTP address of the gateway's metrics, of Prometheus' service discovery and of the status page; port 0 takes any.
      traces_endpoint: OTLP/gRPC endpoint of a trace collector, such as http://collector:4317; no traces if absent.
      log_prompts: whether logs and traces hold what clients ask and get.
      stall_seconds: for developers: when the gateway's loop, or the leader's beside its devices, stands still for longer, the
        log names what held it. 0.01 finds what disturbs others; it costs some percent of a processor.
      plan_log: for developers: directory in which leaders record each plan and its tokens, for `python -m tools.replay`. The
        record holds what clients ask and get, as tokens, and grows without end.
    """

    address: Annotated[str, HostPort()] = "127.0.0.1:9464"
    traces_endpoint: str | None = None
    log_prompts: bool = False
    stall_seconds: Annotated[float | None, Between(0.001, 60)] = None
    plan_log: Annotated[str | None, AbsolutePath()] = None


@dataclasses.dataclass(frozen=True)
class Config:
    """A whole `ray_config.yaml`.

    Attributes:
      replicas: meshes that serve side by side; with autoscaling, the fewest.
    """

    model: ModelSpec
    cluster: ClusterSection = ClusterSection()
    replicas: Annotated[int, AtLeast(1)] = 1
    autoscaling: AutoscalingSection = AutoscalingSection()
    mesh: MeshSpec = MeshSpec()
    engine: EngineSpec = EngineSpec()
    gateway: GatewaySection = GatewaySection()
    telemetry: TelemetrySection = TelemetrySection()


def problems(config: Config) -> Iterator[tuple[str, str]]:
    """What is wrong between settings that are each right: the setting to change, and a sentence."""
    if not config.model.name:
        yield "model.name", "model.name is empty"
    if config.mesh.rules not in RULES:
        yield "mesh.rules", f"mesh.rules={config.mesh.rules} is unknown; use {', '.join(RULES)}"
    most = config.autoscaling.max_replicas
    if most is not None and most < config.replicas:
        problem = f"autoscaling.max_replicas={most} is less than replicas={config.replicas}, the fewest"
        yield "autoscaling.max_replicas", problem
    yield from _tls_problems(config.gateway)
    yield from _mesh_problems(config)


def _tls_problems(gateway: GatewaySection) -> Iterator[tuple[str, str]]:
    halves = (gateway.tls_certificate is None) != (gateway.tls_key is None)
    if halves or (gateway.tls_client_ca is not None and gateway.tls_certificate is None):
        yield "gateway", "gateway.tls_certificate and gateway.tls_key belong together, and tls_client_ca to both"


def _mesh_problems(config: Config) -> Iterator[tuple[str, str]]:
    mesh = config.mesh
    if mesh.platform == "tpu" and mesh.hosts > 1 and config.cluster.tpu_pod_type is None:
        yield (
            "mesh.platform",
            f"mesh.platform=tpu with mesh.hosts={mesh.hosts} needs cluster.tpu_pod_type, such as v6e-16: "
            "all hosts of a replica must be of one slice",
        )
    if mesh.smallest is not None and mesh.smallest > mesh.hosts:
        yield "mesh.smallest", f"mesh.smallest={mesh.smallest} is more than mesh.hosts={mesh.hosts}"
    if mesh.smallest is not None and mesh.platform == "tpu":
        yield "mesh.smallest", "mesh.smallest: the hosts of a TPU slice can't be divided; leave it out"
    devices = mesh.hosts * mesh.devices_per_host
    if mesh.data * mesh.model != devices:
        yield (
            "mesh.data",
            f"mesh.data={mesh.data} x mesh.model={mesh.model} must be {devices}, "
            f"the devices of mesh.hosts={mesh.hosts} x mesh.devices_per_host={mesh.devices_per_host}",
        )
    if mesh.rules != "tensor" and config.engine.slots % mesh.data:
        yield "engine.slots", f"engine.slots={config.engine.slots} must be a multiple of mesh.data={mesh.data}"
    activations = {"gpu": "bfloat16", "cpu": "float32"}.get(mesh.platform, config.model.activations)
    fits = config.model.activations == activations and (mesh.rules != "xai" or mesh.platform == "tpu")
    if config.model.weights == "int4" and not fits:
        yield (
            "model.weights",
            f"model.weights=int4 on mesh.platform={mesh.platform} is for model.activations={activations} and mesh.rules but "
            "xai: else nothing would be saved; use int8",
        )


def check_model(config: Config, model: GrokConfig, path: pathlib.Path) -> None:
    """Checks that the model lies on the mesh and the engine fits the model. Raises ConfigError."""
    heads, mesh = model.num_kv_heads, config.mesh
    choices = ", ".join(str(n) for n in range(1, heads + 1) if heads % n == 0)
    if mesh.rules == "tensor" and heads % (mesh.data * mesh.model):
        raise ConfigError(
            f"{path}: mesh.data x mesh.model = {mesh.data * mesh.model} does not divide {heads} KV heads; "
            f"use {choices} devices, or mesh.rules: batch"
        )
    if heads % mesh.model:
        raise ConfigError(f"{path}: mesh.model={mesh.model} does not divide {heads} KV heads; use {choices}")
    context = config.engine.context
    if context is not None and context > model.sequence_len:
        raise ConfigError(f"{path}: engine.context={context} exceeds the model's {model.sequence_len}")
    pages, groups = config.engine.kv_pages, 1 if mesh.rules == "tensor" else mesh.data
    needed = groups * (1 + -(-(context or model.sequence_len) // config.engine.page_size))
    if pages is not None and pages < needed:
        raise ConfigError(
            f"{path}: engine.kv_pages={pages} can't hold one sequence of the whole context in each of {groups} group(s); "
            f"use at least {needed}, or a shorter engine.context"
        )
