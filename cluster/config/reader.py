"""`ray_config.yaml`: the one file that an operator edits, typed and checked before anything starts."""

from __future__ import annotations

import dataclasses
import math
import pathlib
import types
import typing
from typing import Any

import yaml

from workers.capacity.hardware import DEVICES
from workers.messages.specs import EngineSpec, MeshSpec, ModelSpec
from workers.model.config import GrokConfig
from workers.model.layout import RULES

PLATFORMS = ("cpu", "gpu", "tpu")
WEIGHTS = ("int4", "int8", "int8-unrounded", "bfloat16", "float32")
ACTIVATIONS = ("float32", "bfloat16")
KV_CACHES = (*ACTIVATIONS, "int8")


class ConfigError(ValueError):
    """A configuration that can't be used: `file:line: what is wrong; what to do`."""


@dataclasses.dataclass(frozen=True)
class ModelSection:
    """What is served.

    Attributes:
      name: by which clients know it.
      checkpoint: directory with ckpt-0/ and tokenizer.model, the same path on every host, relative to this file; or the URL of
        one in an object store, such as s3://bucket/grok-1.
      weights: int8 (as released, and rounded to bfloat16 when scaled, as xAI's code does), bfloat16 or float32; on CPU hosts
        also int8-unrounded: up to half as fast again in batches and prompts, while logits move by half a percent of their
        spread, which is less than what bfloat16 activations move them. int4 is for TPUs: half the memory, in groups of 128
        rows; see docs/capacity.md for what it costs.
      activations: float32 or bfloat16.
      kv_cache: float32, bfloat16 or int8: how keys and values are kept; as activations if absent. int8 has a scale for each
        position of a head; on CPU hosts the fast kernels do not know it.
    """

    name: str
    checkpoint: str
    weights: str = "int8"
    activations: str = "float32"
    kv_cache: str | None = None


@dataclasses.dataclass(frozen=True)
class ClusterSection:
    """The Ray cluster.

    Attributes:
      address: `local` starts one on this machine, with as many hosts as the replicas need; otherwise a Ray address.
      platform: cpu, gpu or tpu.
      cpus_per_host: logical Ray CPUs that a worker takes.
      tpu_pod_type: of a platform of TPUs, Ray's name for the kind of slice that a replica takes whole, such as v6e-16.
      accelerator: of GPU hosts, their kind, such as H100: whether the model fits is then known before anything is started.
      memory_per_host: of CPU hosts, the GB that each has, for the same purpose; in a local cluster, this machine's, shared by
        its hosts, if absent.
      compilation_cache: directory on each host where compiled programs are kept; empty for none.
      silence_seconds: a host or a leader that has said nothing for so long is lost. They say something four times a second;
        on a network that loses a tenth of its packets, take twice as much.
    """

    address: str = "local"
    platform: str = "cpu"
    cpus_per_host: int = 1
    tpu_pod_type: str | None = None
    accelerator: str | None = None
    memory_per_host: float | None = None
    compilation_cache: str = "~/.cache/grokmesh/xla"
    silence_seconds: float = 1.5


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

    max_replicas: int | None = None
    queue_per_replica: float = 8.0
    time_to_first_token: float = 5.0
    up_seconds: float = 10.0
    down_seconds: float = 300.0


@dataclasses.dataclass(frozen=True)
class MeshSection:
    """The device mesh of each replica.

    Attributes:
      hosts: worker processes, each on a host of its own.
      devices_per_host: devices of each.
      data, model: sizes of the mesh's axes; data * model = hosts * devices_per_host.
      rules: how the model lies on it: tensor, batch or xai.
    """

    hosts: int = 1
    devices_per_host: int = 1
    data: int = 1
    model: int = 1
    rules: str = "tensor"


@dataclasses.dataclass(frozen=True)
class EngineSection:
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

    slots: int = 16
    page_size: int = 16
    prefill_chunk: int = 64
    context: int | None = None
    kv_pages: int | None = None
    max_waiting: int = 512
    steps_per_plan: int = 1
    prefill_slowdown: float = 3.0


@dataclasses.dataclass(frozen=True)
class GatewaySection:
    """The gRPC server.

    Attributes:
      address: where it listens.
      max_requests: requests that may be in it at once; more are turned away.
      queue_seconds: a request that would likely wait longer for a slot, or longer than its deadline leaves, is turned away.
      max_message_bytes: of a client's message.
      drain_seconds: how long requests may go on after the service is told to stop.
      failover_seconds: how long requests wait for a lost replica to be built again where no other serves. They go on then where
        they were, and their clients see nothing but a pause. If absent, at least two minutes, and a minute more than twice what
        the planner thinks that loading takes.
      api_keys: file of `name: SHA-256 of the key` lines, as `grokmesh key` makes them, or of names with scopes and limits;
        relative to this file. Without it every caller may complete prompts.
      tls_certificate, tls_key: PEM files of the gateway's certificate chain and its key; without them nothing is encrypted. All
        files of keys and certificates are read again when they change.
      tls_client_ca: PEM file of the authority that signs clients' certificates; with it, clients without one are refused.
    """

    address: str = "127.0.0.1:50051"
    max_requests: int = 512
    queue_seconds: float = 60.0
    max_message_bytes: int = 4 * 1024 * 1024
    drain_seconds: float = 10.0
    failover_seconds: float | None = None
    api_keys: pathlib.Path | None = None
    tls_certificate: pathlib.Path | None = None
    tls_key: pathlib.Path | None = None
    tls_client_ca: pathlib.Path | None = None


@dataclasses.dataclass(frozen=True)
class TelemetrySection:
    """What the service tells of itself.

    Attributes:
      address: HTTP address of the gateway's metrics, of Prometheus' service discovery and of the status page; port 0 takes any.
      traces_endpoint: OTLP/gRPC endpoint of a trace collector, such as http://collector:4317; no traces if absent.
      log_prompts: whether logs and traces hold what clients ask and get.
      stall_seconds: for developers: when the gateway's loop, or the leader's beside its devices, stands still for longer, the
        log names what held it. 0.01 finds what disturbs others; it costs some percent of a processor.
    """

    address: str = "127.0.0.1:9464"
    traces_endpoint: str | None = None
    log_prompts: bool = False
    stall_seconds: float | None = None


@dataclasses.dataclass(frozen=True)
class Config:
    """A whole `ray_config.yaml`.

    Attributes:
      replicas: meshes that serve side by side; with autoscaling, the fewest.
    """

    model: ModelSection
    cluster: ClusterSection = ClusterSection()
    replicas: int = 1
    autoscaling: AutoscalingSection = AutoscalingSection()
    mesh: MeshSection = MeshSection()
    engine: EngineSection = EngineSection()
    gateway: GatewaySection = GatewaySection()
    telemetry: TelemetrySection = TelemetrySection()

    @property
    def model_spec(self) -> ModelSpec:
        """For the hosts."""
        return ModelSpec(self.model.checkpoint, self.model.weights, self.model.activations, self.model.kv_cache)

    @property
    def mesh_spec(self) -> MeshSpec:
        """For the hosts."""
        return MeshSpec(platform=self.cluster.platform, **dataclasses.asdict(self.mesh))

    @property
    def engine_spec(self) -> EngineSpec:
        """For the hosts."""
        return EngineSpec(**dataclasses.asdict(self.engine))


def load_config(path: pathlib.Path) -> Config:
    """Reads and checks a configuration.

    Raises:
      ConfigError: it is missing, no YAML, or says something impossible.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: {error}") from error
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else f"{path}"
        raise ConfigError(f"{where}: not YAML: {getattr(error, 'problem', error)}") from error
    except RecursionError as error:
        raise ConfigError(f"{path}: nested too deeply") from error
    reader = _Reader(path)
    config: Config = reader.section(Config, root, "")
    checkpoint = config.model.checkpoint
    if "://" not in checkpoint:
        checkpoint = str(reader.path("model.checkpoint", checkpoint))
    model = dataclasses.replace(config.model, checkpoint=checkpoint)
    files: dict[str, Any] = {
        name: reader.path(f"gateway.{name}", file)
        for name in ("api_keys", "tls_certificate", "tls_key", "tls_client_ca")
        if (file := getattr(config.gateway, name)) is not None
    }
    gateway = dataclasses.replace(config.gateway, **files)
    config = dataclasses.replace(config, model=model, gateway=gateway)
    reader.check(config)
    return config


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


class _Reader:
    """Builds frozen dataclasses from YAML nodes, remembering the line of each value."""

    def __init__(self, path: pathlib.Path) -> None:
        self._path = path
        self._lines: dict[str, int] = {}

    def fail(self, name: str, problem: str) -> typing.NoReturn:
        line = self._lines.get(name)
        raise ConfigError(f"{self._path}{f':{line}' if line else ''}: {problem}")

    def path(self, name: str, value: str | pathlib.Path) -> pathlib.Path:
        """A file or folder, relative to the configuration's."""
        try:
            return (self._path.parent / pathlib.Path(value).expanduser()).resolve()
        except (RuntimeError, ValueError, OSError) as error:
            self.fail(name, f"{name}={value}: {error}; write the whole path")

    def section(self, cls: type[Any], node: yaml.Node | None, name: str) -> Any:
        """An instance of the dataclass `cls` from a mapping."""
        if not isinstance(node, yaml.MappingNode):
            self.fail(name, f"{name or 'the file'} must be a mapping of settings")
        hints: dict[str, Any] = typing.get_type_hints(cls)
        values: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key = str(key_node.value)
            full = f"{name}.{key}" if name else key
            self._lines[full] = key_node.start_mark.line + 1
            if key not in hints:
                self.fail(full, f"unknown setting {full}; known are {', '.join(hints)}")
            if key in values:
                self.fail(full, f"{full} is set twice")
            hint = hints[key]
            values[key] = (
                self.section(hint, value_node, full)
                if isinstance(hint, type) and dataclasses.is_dataclass(hint)
                else self._value(hint, value_node, full)
            )
        required = [f.name for f in dataclasses.fields(cls) if f.default is dataclasses.MISSING]
        for key in required:
            if key not in values:
                self.fail(name, f"{f'{name}.' if name else ''}{key} is missing")
        return cls(**values)

    def _value(self, hint: Any, node: yaml.Node, name: str) -> Any:
        value: Any = node
        if isinstance(node, yaml.ScalarNode):
            try:
                value = yaml.SafeLoader("").construct_object(node)
            except (yaml.YAMLError, ValueError) as error:
                self.fail(name, f"{name}: {error}")
        allowed = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
        if value is None and type(None) in allowed:
            return None
        for kind in allowed:
            if kind is pathlib.Path and isinstance(value, str):
                return pathlib.Path(value)
            if kind is float and isinstance(value, int) and not isinstance(value, bool):
                return float(value)
            if type(value) is kind:
                return value
        shown = value if isinstance(node, yaml.ScalarNode) else "a list or mapping"
        wanted = " or ".join(kind.__name__.replace("NoneType", "nothing") for kind in allowed)
        self.fail(name, f"{name}: expected {wanted}, got {shown!r}")

    def check(self, config: Config) -> None:
        """Checks all that needs no model."""
        for name in (
            "replicas", "cluster.cpus_per_host", "mesh.hosts", "mesh.devices_per_host", "mesh.data", "mesh.model",
            "engine.slots", "engine.page_size", "engine.prefill_chunk", "engine.context", "engine.kv_pages",
            "engine.max_waiting", "engine.steps_per_plan",
            "gateway.max_requests", "gateway.max_message_bytes", "autoscaling.max_replicas",
        ):  # fmt: skip
            value = _lookup(config, name)
            if value is not None and value < 1:
                self.fail(name, f"{name}={value} must be at least 1")
        for name, choices in (
            ("model.weights", WEIGHTS),
            ("model.activations", ACTIVATIONS),
            ("model.kv_cache", (*KV_CACHES, None)),
            ("cluster.platform", PLATFORMS),
            ("mesh.rules", RULES),
        ):
            if _lookup(config, name) not in choices:
                self.fail(name, f"{name}={_lookup(config, name)} is unknown; use {', '.join(filter(None, choices))}")
        for name in ("gateway.address", "telemetry.address"):
            host, _, port = _lookup(config, name).rpartition(":")
            if not host or not port.isdecimal() or int(port) > 65535:
                self.fail(name, f"{name}={_lookup(config, name)} is no host:port")
        for name in (
            "gateway.drain_seconds", "gateway.queue_seconds", "gateway.failover_seconds", "autoscaling.queue_per_replica",
            "autoscaling.time_to_first_token",
            "autoscaling.up_seconds", "autoscaling.down_seconds", "engine.prefill_slowdown",
        ):  # fmt: skip
            value = _lookup(config, name)
            if value is not None and not (math.isfinite(value) and value >= 0):
                self.fail(name, f"{name}={value} must be a finite number of at least 0")
        most = config.autoscaling.max_replicas
        if most is not None and most < config.replicas:
            self.fail(
                "autoscaling.max_replicas",
                f"autoscaling.max_replicas={most} is less than replicas={config.replicas}, the fewest",
            )
        gateway = config.gateway
        if (gateway.tls_certificate is None) != (gateway.tls_key is None) or (
            gateway.tls_client_ca is not None and gateway.tls_certificate is None
        ):
            self.fail(
                "gateway", "gateway.tls_certificate and gateway.tls_key belong together, and tls_client_ca to both"
            )
        mesh = config.mesh
        if config.cluster.platform == "tpu" and mesh.hosts > 1 and config.cluster.tpu_pod_type is None:
            self.fail(
                "cluster.platform",
                f"cluster.platform=tpu with mesh.hosts={mesh.hosts} needs cluster.tpu_pod_type, such as v6e-16: "
                "all hosts of a replica must be of one slice",
            )
        devices = mesh.hosts * mesh.devices_per_host
        if mesh.data * mesh.model != devices:
            self.fail(
                "mesh.data" if "mesh.data" in self._lines else "mesh",
                f"mesh.data={mesh.data} x mesh.model={mesh.model} must be {devices}, "
                f"the devices of mesh.hosts={mesh.hosts} x mesh.devices_per_host={mesh.devices_per_host}",
            )
        if mesh.rules != "tensor" and config.engine.slots % mesh.data:
            self.fail("engine.slots", f"engine.slots={config.engine.slots} must be a multiple of mesh.data={mesh.data}")
        if config.model.weights == "int4" and config.cluster.platform != "tpu":
            self.fail("model.weights", "model.weights=int4 is for TPUs: elsewhere nothing would be saved; use int8")
        kinds = [device.name for device in DEVICES.values() if device.platform == "gpu"]
        if config.cluster.accelerator not in (None, *kinds):
            accelerator = config.cluster.accelerator
            self.fail("cluster.accelerator", f"cluster.accelerator={accelerator} is unknown; use {', '.join(kinds)}")
        silence = config.cluster.silence_seconds
        if not 0.5 <= silence <= 60:
            self.fail("cluster.silence_seconds", f"cluster.silence_seconds={silence} must be from 0.5 to 60")
        stall = config.telemetry.stall_seconds
        if stall is not None and not 0.001 <= stall <= 60:
            self.fail("telemetry.stall_seconds", f"telemetry.stall_seconds={stall} must be from 0.001 to 60")
        memory = config.cluster.memory_per_host
        if memory is not None and not (math.isfinite(memory) and memory > 0):
            self.fail("cluster.memory_per_host", f"cluster.memory_per_host={memory} must be a positive number of GB")
        if not config.model.name:
            self.fail("model.name", "model.name is empty")


def _lookup(config: Config, name: str) -> Any:
    value: Any = config
    for part in name.split("."):
        value = getattr(value, part)
    return value
