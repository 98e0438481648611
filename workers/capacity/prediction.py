"""How long steps take, from bytes, operations and sums over devices."""

from __future__ import annotations

import dataclasses
import math

from workers.capacity.hardware import Device, Hardware
from workers.capacity.memory import Precision, kv_bytes_per_token, parameter_bytes, part_of
from workers.model.config import GrokConfig
from workers.model.layout import Layout
from workers.model.parameters import parameter_table

#: Shares of what the makers promise that programs reach: at best, and when all goes badly. Measured on an H100, an H200, CPUs.
_BANDWIDTH = {"tpu": (0.9, 0.6), "gpu": (0.8, 0.5), "cpu": (0.95, 0.75)}
#: Weights a second beyond which bandwidth does not help, as processors widen them no faster. An H200 computes steps in the
#: time of an H100, whose bandwidth this is. TPUs as the compiler's schedule says: for 2^20 weights of 8 bits a core of v4, two
#: a chip, takes 2,930 cycles of 1.05 GHz; others widen those faster than they read.
_WIDENED = {
    "int8": {"H200": 3.35e12, "v4": 0.75e12},
    "int4": {"H200": 3.35e12, "v4": 0.91e12, "v5e": 1.54e12, "v5p": 3.4e12, "v6e": 2.57e12},
}
_FLOPS = {"tpu": (0.7, 0.35), "gpu": (0.4, 0.2), "cpu": (1.0, 0.85)}
#: Seconds of each layer's own that do not shrink with its size, the start of its operations, and those of the step.
_LAYER_SECONDS = {"tpu": (0.0, 15e-6), "gpu": (30e-6, 90e-6), "cpu": (40e-6, 40e-6)}
_STEP_SECONDS = {"tpu": (0.0, 0.3e-3), "gpu": (0.1e-3, 0.3e-3), "cpu": (0.3e-3, 0.3e-3)}


@dataclasses.dataclass(frozen=True)
class Range:
    """Seconds, if all goes well and if it does not."""

    best: float
    worst: float

    @property
    def middle(self) -> float:
        """The geometric mean: what to expect."""
        return math.sqrt(self.best * self.worst)


def expected_experts(config: GrokConfig, rows: int) -> float:
    """How many different experts of a layer `rows` tokens choose, if each chooses evenly: E (1 - (1 - S/E)^rows)."""
    share = config.num_selected_experts / config.num_experts
    return config.num_experts * (1.0 - (1.0 - share) ** rows)


def active_parameters(config: GrokConfig) -> int:
    """Parameters in matrices that one token is multiplied with, but for the table's."""
    chosen = config.num_selected_experts / config.num_experts
    shares = {"experts": chosen, "attention": 1.0, "table": 0.0, "rest": 1.0}
    return round(sum(info.size * shares[part_of(info)] for info in parameter_table(config)))


def decode_bytes(
    config: GrokConfig, layout: Layout, precision: Precision, platform: str, batch: int, positions: int
) -> float:
    """Bytes that a device reads in one step of `batch` sequences that are `positions` long: of weights, experts only the
    expected share, and of keys and values."""
    total = 0.0
    share = expected_experts(config, batch) / config.num_experts
    for info in parameter_table(config):
        size = parameter_bytes(info, layout, precision, platform)
        total += size * (share if part_of(info) == "experts" else 1.0)
    local = -(-batch // layout.batch_groups)
    cache = kv_bytes_per_token(config, precision.kv_cache) / layout.ways(layout.axes("kv_heads"))
    return total + cache * local * positions


def sum_seconds(hardware: Hardware, ways: int, size: float) -> float:
    """Seconds of a sum over `ways` devices, of `size` bytes on each: a ring over each host's devices, then one over hosts. Each
    device of a CPU host exchanges with those of other hosts by itself."""
    device = hardware.device
    if ways == 1:
        return 0.0
    inner = min(ways, max(1, hardware.devices // hardware.hosts)) if device.platform != "tpu" else ways
    outer = -(-ways // inner)
    seconds = 0.0
    if inner > 1:
        seconds += device.link_seconds + 2 * size * (inner - 1) / inner / device.link
    if outer > 1:
        sent = inner * size if device.platform == "cpu" else size / inner
        seconds += device.network_seconds + 2 * sent * (outer - 1) / outer / device.network
    return seconds


def decode_seconds(
    config: GrokConfig, layout: Layout, precision: Precision, hardware: Hardware, batch: int, positions: int
) -> Range:
    """One step of `batch` sequences that are `positions` long."""
    device, ways = hardware.device, hardware.devices
    read = decode_bytes(config, layout, precision, device.platform, batch, positions) / device.bandwidth
    # GPUs widen 4 bits no faster than they read 8.
    most = device.bandwidth if device.platform == "gpu" else math.inf
    in_8_bits = dataclasses.replace(precision, weights="int8")
    widened = decode_bytes(config, layout, in_8_bits, device.platform, batch, positions)
    read = max(read, widened / _WIDENED.get(precision.weights, {}).get(device.name, most))
    operations = 2 * batch * (active_parameters(config) + config.vocab_size * config.emb_size) / ways
    rows = batch * config.emb_size * 4
    sums = sum_seconds(hardware, layout.ways(layout.axes("q_heads")), rows / layout.batch_groups)
    sums += sum_seconds(hardware, layout.ways(layout.axes("ffn")), rows)
    fixed = _fixed(config, device)
    memory, compute = _limits(device, read, operations)
    if device.platform == "cpu":  # one core computes while another waits, but not all of the time
        over_hosts = config.num_layers * sums
        return Range(
            math.hypot(memory.best, compute.best) + fixed.best,
            math.hypot(memory.worst, compute.worst) + fixed.worst + over_hosts,
        )
    worst = max(memory.worst, compute.worst) + config.num_layers * sums + fixed.worst
    return Range(max(memory.best, compute.best) + fixed.best, worst)


def prefill_seconds(config: GrokConfig, layout: Layout, hardware: Hardware, tokens: int, chunk: int) -> Range:
    """A prompt of `tokens` positions, in chunks, on an idle replica: the time to its first token.

    Two operations for each parameter that a position meets, and four times heads times size for each earlier position.
    """
    device = hardware.device
    groups = layout.batch_groups  # a prompt's attention is computed by one group, its experts by all
    attention = 2 * tokens * tokens * config.num_q_heads * config.key_size * config.num_layers
    operations = (2 * tokens * active_parameters(config) + attention * groups) / hardware.devices
    _, compute = _limits(device, 0.0, operations)
    calls = -(-tokens // chunk)
    width = 2 if device.platform == "tpu" else 4  # bytes of a value that crosses
    size = chunk * groups * config.emb_size * width
    sums = 2 * config.num_layers * calls * sum_seconds(hardware, layout.ways(layout.axes("ffn")), size)
    return Range(compute.best, compute.worst + sums + calls * _fixed(config, device).worst)


def _fixed(config: GrokConfig, device: Device) -> Range:
    """Seconds of a step that no bandwidth shortens."""
    layers, step = _LAYER_SECONDS[device.platform], _STEP_SECONDS[device.platform]
    return Range(step[0] + config.num_layers * layers[0], step[1] + config.num_layers * layers[1])


def _limits(device: Device, read: float, operations: float) -> tuple[Range, Range]:
    """Of a step that would read for `read` seconds if bandwidth were all of what its maker promises."""
    fast, slow = _BANDWIDTH[device.platform]
    most, least = _FLOPS[device.platform]
    return (
        Range(read / fast, read / slow),
        Range(operations / device.flops / most, operations / device.flops / least),
    )
