"""Layers of Grok-1 in their true shapes, as many as the device's memory holds, beside what the planner expects of them:
`python -m tools.selftest.layers [CONFIG]`."""

from __future__ import annotations

import dataclasses
import os
import pathlib
import sys
from collections.abc import Iterator

import jax

from tools.bench import limits
from tools.bench.slice import kernels_of, layers_of, make_steps, read_bandwidth
from tools.bench.steps import Steps, prompt_flops, step_bytes
from tools.selftest import invariance
from tools.selftest.findings import Finding, Outcome
from workers.capacity.hardware import Hardware, cpu_hosts, device_of
from workers.capacity.memory import Precision
from workers.capacity.planner import layout_of
from workers.capacity.prediction import Range, decode_seconds, prefill_seconds
from workers.kernels.cpu.bindings import NativeKernelsError
from workers.model.config import GrokConfig

_PAGE, _STEPS, _READ = 64, 24, 2 << 30
#: Parts of a layer, of which a device may have one.
_PARTS = (1, 2, 4, 8)
#: Of an accelerator's memory what weights may take, and bytes that programs need; of a CPU host's, and at most.
_SHARE, _PROGRAMS, _CPU_SHARE, _CPU_BYTES = 0.85, 3e9, 0.25, 3e9
#: Times the planner's worst above which a step is slow.
_TOLERANCE = 1.1


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What is computed: sequences that decode together, their positions, those of the prompt and of its chunks."""

    batches: tuple[int, ...]
    past: int
    prompt: int
    chunk: int


SIZES = {True: Sizes((1, 8, 32, 128), 4096, 8192, 2048), False: Sizes((1, 8, 32), 1024, 1024, 512)}


def layers_that_fit(config: GrokConfig, memory: float) -> tuple[int, int]:
    """How many layers fit so many bytes, and of which part of each: the largest of which at least one does."""
    one = dataclasses.replace(config, num_layers=1)
    layer = step_bytes(one, config.num_experts, 0, 0, 0)
    table = 2 * config.vocab_size * config.emb_size
    for part in _PARTS:
        layers = min(config.num_layers, int((memory - table / part) // (layer / part)))
        if layers > 0:
            return layers, part
    raise ValueError(f"{memory / 1e9:.1f} GB do not hold an eighth of a layer")


def measure(
    steps: Steps, config: GrokConfig, sizes: Sizes, hardware: Hardware | None, bandwidth: float
) -> Iterator[Finding]:
    """A step of each batch, and the prompt."""
    accelerator = hardware is None or hardware.device.platform != "cpu"
    kept = "bfloat16" if accelerator else "float32"
    layout, precision = layout_of(config, 1, 1, "batch"), Precision("int8", activations=kept, kv_cache=kept)
    for batch in sizes.batches:
        seconds, experts = steps.decode(batch, sizes.past, _STEPS)
        read = step_bytes(config, experts, batch * (sizes.past + _STEPS // 2), 2, 2 if accelerator else 4)
        expected = decode_seconds(config, layout, precision, hardware, batch, sizes.past) if hardware else None
        text = f"{seconds * 1e3:.2f} ms, {read / seconds / bandwidth:.0%} of {bandwidth / 1e9:,.0f} GB/s"
        yield _judged(f"decode, batch {batch}", seconds, text, expected, {"bytes": read, "bandwidth": bandwidth})
    pages = tuple(range(1, 1 + -(-sizes.prompt // _PAGE)))
    seconds = min(steps.prefill(0, pages, sizes.prompt) for _ in range(2))
    rate = prompt_flops(config) * sizes.prompt / seconds
    expected = prefill_seconds(config, layout, hardware, sizes.prompt, sizes.chunk) if hardware else None
    text = f"{seconds * 1e3:,.0f} ms, {rate / 1e12:.2f} useful TFLOP/s"
    yield _judged(f"prompt of {sizes.prompt:,}", seconds, text, expected, {"operations": rate})


def _judged(name: str, seconds: float, text: str, expected: Range | None, figures: dict[str, float]) -> Finding:
    figures = {"seconds": seconds, **figures}
    if expected is None:
        return Finding("layers", name, Outcome.OK, text, figures)
    outcome = Outcome.OK if seconds <= _TOLERANCE * expected.worst else Outcome.SLOW
    text += f"; the planner expects {expected.middle * 1e3:,.2f}, at worst {expected.worst * 1e3:,.2f}"
    return Finding("layers", name, outcome, text, {**figures, "expected": expected.middle, "worst": expected.worst})


def main() -> int:
    """Argument: the config.json of another model than Grok-1."""
    whole = GrokConfig.load(pathlib.Path(sys.argv[1])) if len(sys.argv) > 1 else GrokConfig()
    device = jax.local_devices()[0]
    try:
        kernels = kernels_of(device)
    except NativeKernelsError as error:
        Finding("layers", "slice", Outcome.SKIPPED, str(error)).say()
        return 0
    sizes = SIZES[kernels.accelerator]
    limit = whole.sequence_len
    sizes = dataclasses.replace(
        sizes,
        past=min(sizes.past, limit // 2 // _PAGE * _PAGE),
        prompt=min(sizes.prompt, limit),
        chunk=min(sizes.chunk, limit),
    )
    if kernels.accelerator:
        memory = _SHARE * (device.memory_stats() or {})["bytes_limit"] - _PROGRAMS
        bandwidth, known = read_bandwidth(_READ), device_of(device.device_kind)
        hardware = Hardware(known, 1, 1) if known else None
    else:
        host = float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
        memory, bandwidth = min(_CPU_SHARE * host, _CPU_BYTES), limits.read_bandwidth()
        hardware = cpu_hosts(host, bandwidth, limits.matmul_peak(), 1)
    layers, part = layers_that_fit(whole, memory)
    config, slots = layers_of(whole, layers, part), max(sizes.batches)
    steps = make_steps(config, kernels, slots=slots, past=sizes.past, prompt=sizes.prompt, chunk=sizes.chunk)
    share = "whole" if part == 1 else f"one of {part} parts of each"
    Finding(
        "layers",
        "slice",
        Outcome.OK,
        f"{layers} of {whole.num_layers} layers, {share}",
        {"layers": layers, "part": part},
    ).say()
    for finding in measure(steps, config, sizes, hardware, bandwidth):
        finding.say()
    invariance.compare(steps.runtime).say()
    return 0


if __name__ == "__main__":
    sys.exit(main())
