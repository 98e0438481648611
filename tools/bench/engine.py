"""Steps of an engine in this process, without a service: `python -m tools.bench.engine` or `grokmesh bench engine`."""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from tools.bench import options
from tools.bench.checkpoint import make_checkpoint
from tools.bench.limits import matmul_peak, read_bandwidth
from tools.bench.steps import Steps, prompt_flops, step_bytes
from workers.capacity.memory import VALUE_BYTES
from workers.checkpoint.checkpoint import Checkpoint, open_checkpoint
from workers.checkpoint.loader import load_parameters
from workers.host.kernel_selection import select_kernels
from workers.messages.plan import EngineShape
from workers.messages.specs import MeshSpec, ModelSpec
from workers.model.partition import Partition
from workers.runtime.mesh import make_mesh
from workers.runtime.program_set import ProgramSet
from workers.runtime.runtime import Runtime

CHUNK, PAGE, SLOTS = 512, 64, 16
#: Positions that a sequence may decode past its prompt, and the rest of its last page.
ROOM = 2 * PAGE


@dataclasses.dataclass(frozen=True)
class Figure:
    """One measurement.

    Attributes:
      name: what was measured.
      seconds: of one step, the median.
      tokens_per_second: over the batch.
      share: of the limit: of read bandwidth for decoding, of XLA's float32 matrix product for prefill, of that for scoring.
    """

    name: str
    seconds: float
    tokens_per_second: float
    share: float


class Engine:
    """A checkpoint's model in a runtime on one process."""

    def __init__(self, checkpoint: Checkpoint, weights: str, kv_cache: str, devices: int, context: int) -> None:
        self.config = checkpoint.config
        mesh = MeshSpec("cpu", 1, devices, 1, devices, "tensor")
        kernels = select_kernels(
            ModelSpec("bench", str(checkpoint.directory), weights, "float32", kv_cache), mesh, checkpoint
        )
        partition = Partition.create(self.config, make_mesh(1, devices), "tensor", kernels)
        params, _ = load_parameters(checkpoint, partition, weights=weights)
        self.kernels = kernels.name
        kv_dtype: Any = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}[kv_cache]
        self._kv_bytes = jnp.dtype(kv_dtype).itemsize
        self._table_bytes, self._weight_bytes = 2 if kernels.packed else 4, VALUE_BYTES[weights]
        pages = 1 + 2 * -(-context // PAGE)
        shape = EngineShape(SLOTS, 1, pages, PAGE, CHUNK, context, kernels.batch_invariant)
        runtime = Runtime(ProgramSet(self.config, shape, partition, params, kv_dtype=kv_dtype), partition)
        runtime.set_parameters(params)
        runtime.warm_up()
        self.steps = Steps(runtime)

    def decode(self, batch: int, positions: int, steps: int) -> tuple[float, int]:
        """Median seconds of a decode step, and the bytes that a step reads at least."""
        seconds, experts = self.steps.decode(batch, positions, steps)
        cached = batch * (positions + steps // 2)
        return seconds, step_bytes(self.config, experts, cached, self._table_bytes, self._kv_bytes, self._weight_bytes)


def measure(engine: Engine, long_context: int, report: Callable[[str], None]) -> list[Figure]:
    """All figures; each decode figure beside a bandwidth of its own moment, as a shared machine's changes."""
    figures = []
    cases = [(batch, 16, 40) for batch in (1, 4, 8, 16)]
    cases += [(batch, long_context, 16) for batch in (1, 8)] if long_context else []
    for batch, positions, steps in cases:
        before = read_bandwidth(3)
        seconds, read = engine.decode(batch, positions, steps)
        bandwidth = max(before, read_bandwidth(3))
        name = f"decode, batch {batch}, {positions} positions"
        figures.append(Figure(name, seconds, batch / seconds, read / seconds / bandwidth))
        report(_line(figures[-1], f"of {bandwidth / 1e9:.1f} GB/s read"))
    peak = matmul_peak()
    pages = tuple(range(1, 1 + CHUNK // PAGE))
    pairs = [[engine.steps.prefill(0, pages, CHUNK, scored=scored) for scored in (False, True)] for _ in range(5)]
    seconds, scoring = map(statistics.median, zip(*pairs, strict=True))
    flops = prompt_flops(engine.config) * CHUNK / seconds
    figures.append(Figure(f"prefill, {CHUNK} positions", seconds, CHUNK / seconds, flops / peak))
    report(_line(figures[-1], f"of {peak / 1e9:.0f} GFLOP/s, XLA's float32 product"))
    share = statistics.median(prefill / scored for prefill, scored in pairs)
    figures.append(Figure(f"scoring, {CHUNK} positions", scoring, CHUNK / scoring, share))
    report(_line(figures[-1], "of prefill's speed"))
    return figures


def _line(figure: Figure, limit: str) -> str:
    return (
        f"{figure.name:<36} {figure.seconds * 1000:>9.2f} ms {figure.tokens_per_second:>9.1f} tokens/s "
        f"{figure.share:>6.1%} {limit}"
    )


def main() -> int:
    """Prints the figures, and writes them as JSON if asked to."""
    parser = argparse.ArgumentParser(prog="grokmesh bench engine")
    options.add_arguments(parser)
    arguments = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", arguments.devices)
    if not (arguments.checkpoint / "ckpt-0").exists():
        print(f"making a model of random weights in {arguments.checkpoint}", file=sys.stderr)
        make_checkpoint(arguments.checkpoint)
    checkpoint = open_checkpoint(arguments.checkpoint)
    context = min(checkpoint.config.sequence_len, max(arguments.context + ROOM, 2 * CHUNK))
    engine = Engine(checkpoint, arguments.weights, arguments.kv_cache, arguments.devices, context)
    print(
        f"{checkpoint.directory}: kernels {engine.kernels}, weights {arguments.weights}, KV cache {arguments.kv_cache}"
    )
    figures = measure(engine, min(arguments.context, context - ROOM), print)
    if arguments.output:
        shown: dict[str, Any] = {"kernels": engine.kernels, "figures": [dataclasses.asdict(f) for f in figures]}
        arguments.output.write_text(json.dumps(shown, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
