"""Steps of an engine in this process, without a service: `python -m tools.bench.engine` or `grokmesh bench engine`."""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from tools.bench import options
from tools.bench.checkpoint import make_checkpoint
from tools.bench.limits import matmul_peak, read_bandwidth
from workers.checkpoint.checkpoint import Checkpoint, open_checkpoint
from workers.checkpoint.loader import load_parameters
from workers.host.kernel_selection import select_kernels
from workers.messages.plan import Chunk, DecodeRow, EngineShape, Plan, Sampling, SlotStart
from workers.messages.specs import MeshSpec, ModelSpec
from workers.model.partition import Partition
from workers.runtime.mesh import make_mesh
from workers.runtime.program_set import ProgramSet
from workers.runtime.runtime import Pending, Runtime

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
      share: of the limit: of read bandwidth for decoding, of XLA's float32 matrix product for prefill.
    """

    name: str
    seconds: float
    tokens_per_second: float
    share: float


class Engine:
    """A runtime on one process, driven step by step."""

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
        self._table_bytes = 2 if kernels.packed else 4
        pages = 1 + 2 * -(-context // PAGE)
        shape = EngineShape(SLOTS, 1, pages, PAGE, CHUNK, context, kernels.batch_invariant)
        self.runtime = Runtime(ProgramSet(self.config, shape, partition, params, kv_dtype=kv_dtype), partition)
        self.runtime.set_parameters(params)
        self.runtime.warm_up()
        self._plans = 0

    def prefill(self, slot: int, pages: tuple[int, ...], length: int, known: int = 0) -> float:
        """Gives a slot `length` positions, of which pages hold the first `known`; seconds that it took."""
        known = min(known, length - 1)
        tokens = tuple(3 + (7 * i + (slot if i >= known else 0)) % (self.config.vocab_size - 3) for i in range(length))
        began = time.perf_counter()
        for start in range(known, length, CHUNK):
            chunk = Chunk(slot, start, tokens[start : start + CHUNK], last=start + CHUNK >= length)
            starts = (SlotStart(slot, pages, Sampling()),) if start == known else ()
            self.runtime.read(self._run(Plan(0, starts, ((chunk,),), ())))
        return time.perf_counter() - began

    def decode(self, batch: int, positions: int, steps: int) -> tuple[float, int]:
        """Median seconds of a decode step, one step ahead, and the bytes that a step reads at least."""
        # All have the same past, on pages that they share; each has its own for what comes. Memory sees no difference, as the
        # pages of one long sequence are more than caches hold.
        past, own = positions // PAGE, -(-(steps + PAGE) // PAGE)
        shared = tuple(range(1, 1 + past))
        for slot in range(batch):
            first = 1 + past + slot * own
            self.prefill(slot, (*shared, *range(first, first + own)), positions, 0 if slot == 0 else past * PAGE)
        times: list[float] = []
        counts: list[jax.Array] = []
        pending: Pending | None = None
        for step in range(steps):
            began = time.perf_counter()
            rows = tuple(DecodeRow(slot, positions + step) for slot in range(batch))
            dispatched = self._run(Plan(0, (), (), rows))
            if pending is not None:
                self.runtime.read(pending)
                times.append(time.perf_counter() - began)
            pending = dispatched
            counts += dispatched.expert_counts
        assert pending is not None
        self.runtime.read(pending)
        experts = statistics.median(int((count > 0).sum()) for count in counts)
        return statistics.median(times), self._bytes(int(experts), batch, positions + steps // 2)

    def _bytes(self, experts: int, batch: int, positions: int) -> int:
        """Weights of chosen experts, attention and table, and valid keys and values."""
        c = self.config
        heads = (2 * c.num_q_heads + 2 * c.num_kv_heads) * c.key_size * c.emb_size * c.num_layers
        table = c.vocab_size * c.emb_size * self._table_bytes
        cache = 2 * c.num_kv_heads * c.key_size * c.num_layers * self._kv_bytes * positions * batch
        total: int = experts * 3 * c.emb_size * c.ffn_size + heads + table + cache
        return total

    def flops_per_token(self) -> float:
        """Useful operations of one prompt position: two for each weight that it meets; the table is met once a prompt."""
        c = self.config
        heads = (2 * c.num_q_heads + 2 * c.num_kv_heads) * c.key_size * c.emb_size
        return 2.0 * c.num_layers * (heads + c.num_selected_experts * 3 * c.emb_size * c.ffn_size)

    def _run(self, plan: Plan) -> Pending:
        self._plans += 1
        return self.runtime.execute(dataclasses.replace(plan, number=self._plans))


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
    seconds = statistics.median(engine.prefill(0, pages, CHUNK) for _ in range(5))
    flops = engine.flops_per_token() * CHUNK / seconds
    figures.append(Figure(f"prefill, {CHUNK} positions", seconds, CHUNK / seconds, flops / peak))
    report(_line(figures[-1], f"of {peak / 1e9:.0f} GFLOP/s, XLA's float32 product"))
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
