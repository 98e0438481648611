"""Which mesh, with room for how many sequences, and how fast; or why not, and what would do."""

from __future__ import annotations

import dataclasses

from workers.capacity.hardware import DEVICES, GIB, TOPOLOGIES, Hardware, gpu_hosts, tpu_slice
from workers.capacity.memory import Memory, Precision, kv_bytes_per_token, memory
from workers.capacity.prediction import Range, decode_seconds, prefill_seconds
from workers.model.config import GrokConfig
from workers.model.layout import Layout

BATCHES = (1, 8, 32, 64, 128)
PROMPTS = (1024, 8192)
#: Pages on accelerators: large enough for their memory's tiles.
PAGE_SIZE, CHUNK = 64, 512


class DoesNotFitError(ValueError):
    """A model that does not fit the hardware: why, and what would do."""


@dataclasses.dataclass(frozen=True)
class Workload:
    """What is asked of a replica.

    Attributes:
      context: longest sequence.
      concurrency: sequences that decode together.
      step_seconds: the longest that a step of all of them should take; None for as fast as it can.
    """

    context: int
    concurrency: int
    step_seconds: float | None = None


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One legal mesh.

    Attributes:
      data, model, rules: as in the configuration.
      slots: sequences; the concurrency, rounded up to the batch groups.
      pages: KV pages of each group that fit, no more than all slots can fill.
      memory: on each device, with those pages.
      capacity: sequences of the whole context that fit.
      step: of all slots, half of the context long.
    """

    data: int
    model: int
    rules: str
    slots: int
    pages: int
    memory: Memory
    capacity: int
    step: Range


@dataclasses.dataclass(frozen=True)
class CapacityPlan:
    """The answer.

    Attributes:
      best: the mesh that is recommended.
      candidates: all legal ones that fit, best first.
      decode: seconds of a step, by batch; the sequences are half of the context long.
      prefill: seconds to the first token, by prompt length.
    """

    config: GrokConfig
    hardware: Hardware
    precision: Precision
    workload: Workload
    best: Candidate
    candidates: tuple[Candidate, ...]
    decode: dict[int, Range]
    prefill: dict[int, Range]

    @property
    def layout(self) -> Layout:
        """Of the best mesh."""
        return layout_of(self.config, self.best.data, self.best.model, self.best.rules)

    @property
    def free(self) -> float:
        """Bytes of a device that nothing needs."""
        return self.hardware.device.memory - self.best.memory.total


def layout_of(config: GrokConfig, data: int, model: int, rules: str) -> Layout:
    """The layout of a model on a mesh `data` x `model`."""
    return Layout.of(config, {"data": data, "model": model}, rules)


def meshes(config: GrokConfig, devices: int) -> list[tuple[int, int, str]]:
    """All meshes of so many devices on which the KV heads divide: (data, model, rules)."""
    heads = config.num_kv_heads
    legal = [(1, devices, "tensor")] if heads % devices == 0 else []
    legal += [
        (devices // model, model, "batch")
        for model in range(1, min(heads, devices) + 1)
        if heads % model == 0 and devices % model == 0 and model < devices
    ]
    return [mesh for mesh in legal if config.ffn_size % devices == 0 and config.vocab_size % devices == 0]


def plan(config: GrokConfig, hardware: Hardware, precision: Precision, workload: Workload) -> CapacityPlan:
    """The best mesh for a workload.

    Raises:
      DoesNotFitError: there is no legal mesh, or on none of them even one sequence fits.
    """
    if precision.weights == "int8-unrounded" and hardware.device.platform != "cpu":
        raise DoesNotFitError(
            "int8-unrounded is for the kernels of CPU hosts; use int8, which costs accelerators nothing"
        )
    legal = meshes(config, hardware.devices)
    if not legal:
        raise DoesNotFitError(
            f"{hardware.devices} devices: no mesh of so many divides {config.num_kv_heads} KV heads and experts "
            f"{config.ffn_size} wide; use a power of two"
        )
    tried = [_candidate(config, hardware, precision, workload, *mesh) for mesh in legal]
    fitting = [candidate for candidate in tried if candidate.capacity > 0]
    if not fitting:
        least = min(tried, key=lambda candidate: candidate.memory.total)
        raise DoesNotFitError(_refusal(config, hardware, precision, workload, least))
    ordered = sorted(fitting, key=lambda c: (min(c.capacity, workload.concurrency) * -1, c.step.middle))
    best = ordered[0]
    layout = layout_of(config, best.data, best.model, best.rules)
    middle = workload.context // 2
    decode = {
        batch: decode_seconds(config, layout, precision, hardware, batch, middle)
        for batch in sorted({*BATCHES, workload.concurrency})
    }
    prefill = {
        tokens: prefill_seconds(config, layout, hardware, tokens, CHUNK)
        for tokens in PROMPTS
        if tokens <= config.sequence_len
    }
    return CapacityPlan(config, hardware, precision, workload, best, tuple(ordered), decode, prefill)


def pages_that_fit(
    config: GrokConfig,
    layout: Layout,
    precision: Precision,
    hardware: Hardware,
    *,
    slots: int,
    context: int,
    page_size: int,
    chunk: int,
    most: int | None = None,
) -> tuple[int, Memory]:
    """KV pages of each batch group that the rest of memory has room for, at most `most`, or as many as all slots can fill; and
    memory with them. Fewer than a whole sequence needs means that nothing can be served."""
    if most is None:
        most = slots // layout.batch_groups * -(-context // page_size) + 1
    empty = memory(
        config, layout, precision, hardware.device.platform, slots=slots, pages=0, page_size=page_size, chunk=chunk
    )
    heads = layout.ways(layout.axes("kv_heads"))
    page = kv_bytes_per_token(config, precision.kv_cache) / heads * page_size
    pages = min(most, int((hardware.device.memory - empty.total - _reserve(config, layout, hardware, empty)) // page))
    return pages, dataclasses.replace(empty, kv_pages=max(pages, 0) * page)


def _reserve(config: GrokConfig, layout: Layout, hardware: Hardware, empty: Memory) -> float:
    """What pages leave free on accelerators, which have no other memory to go to: a hundredth for fragments, and room for the
    four parts of experts that are on their way while weights load, if programs take less."""
    if hardware.device.platform == "cpu":
        return 0.0
    loading = 4 * config.emb_size * config.ffn_size / layout.ways(layout.axes("ffn"))
    return 0.01 * hardware.device.memory + max(0.0, loading - empty.programs)


def _candidate(
    config: GrokConfig,
    hardware: Hardware,
    precision: Precision,
    workload: Workload,
    data: int,
    model: int,
    rules: str,
) -> Candidate:
    layout = layout_of(config, data, model, rules)
    groups = layout.batch_groups
    slots = -(-workload.concurrency // groups) * groups
    pages, needed = pages_that_fit(
        config, layout, precision, hardware, slots=slots, context=workload.context, page_size=PAGE_SIZE, chunk=CHUNK
    )
    capacity = groups * max(0, (pages - 1) // -(-workload.context // PAGE_SIZE))
    step = decode_seconds(config, layout, precision, hardware, slots, workload.context // 2)
    return Candidate(data, model, rules, slots, pages, needed, capacity, step)


def _refusal(config: GrokConfig, hardware: Hardware, precision: Precision, workload: Workload, least: Candidate) -> str:
    one = kv_bytes_per_token(config, precision.kv_cache) * workload.context
    heads = min(config.num_kv_heads, least.model if least.rules == "batch" else hardware.devices)
    text = (
        f"does not fit {hardware}: {precision.weights} weights take {least.memory.weights / GIB:.1f} GiB of each device, "
        f"programs and sampling {(least.memory.programs + least.memory.sampling) / GIB:.1f}, one sequence of "
        f"{workload.context} positions {one / heads / GIB:.2f}; a device has {hardware.device.memory / GIB:.1f} GiB"
    )
    would = _what_would(config, hardware, precision, workload)
    return f"{text}. {would}" if would else text


def _what_would(config: GrokConfig, hardware: Hardware, precision: Precision, workload: Workload) -> str:
    """The next larger hardware of the same kind on which it fits, and whether fewer bits would do on this one."""
    found = []
    name = hardware.device.name
    larger: list[Hardware] = []
    if name in TOPOLOGIES:
        larger = [tpu_slice(f"{name}:{topology}") for topology in TOPOLOGIES[name]]
    elif name in DEVICES:
        larger = [gpu_hosts(f"8x{name}", hosts) for hosts in (1, 2, 4, 8)]
    else:
        larger = [dataclasses.replace(hardware, hosts=n, devices=n) for n in (2, 4, 8, 16)]
    for candidate in sorted(larger, key=lambda h: h.devices):
        if candidate.devices > hardware.devices and _fits(config, candidate, precision, workload):
            found.append(str(candidate))
            break
    fewer = {"float32": "bfloat16", "bfloat16": "int8", "int8": "int4"}.get(precision.weights)
    if fewer and _fits(config, hardware, dataclasses.replace(precision, weights=fewer), workload):
        found.append(f"{fewer} weights")
    if (
        precision.kv_cache != "int8"
        and hardware.device.platform != "cpu"
        and _fits(config, hardware, dataclasses.replace(precision, kv_cache="int8"), workload)
    ):
        found.append("an int8 KV cache")
    return f"What would do: {', or '.join(found)}" if found else ""


def _fits(config: GrokConfig, hardware: Hardware, precision: Precision, workload: Workload) -> bool:
    return any(
        _candidate(config, hardware, precision, workload, *mesh).capacity > 0
        for mesh in meshes(config, hardware.devices)
    )
