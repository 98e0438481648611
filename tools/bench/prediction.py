"""The planner's prediction beside what this machine does: decode steps and prefill of a mid-size model on the CPU kernels.

python -m tools.bench.prediction
"""

from __future__ import annotations

import argparse
import dataclasses
import pathlib
import statistics
import sys

import jax

from tools.bench.checkpoint import MID_SIZE, make_checkpoint
from tools.bench.engine import CHUNK, PAGE, Engine
from tools.bench.limits import matmul_peak, read_bandwidth
from workers.capacity.hardware import cpu_hosts
from workers.capacity.memory import Precision
from workers.capacity.planner import layout_of
from workers.capacity.prediction import Range, decode_seconds, prefill_seconds
from workers.checkpoint.checkpoint import open_checkpoint
from workers.model.config import GrokConfig

#: Narrower, deeper, with more heads: what nothing was fitted to.
OTHER = dataclasses.replace(
    MID_SIZE, emb_size=768, num_layers=20, num_q_heads=12, num_kv_heads=4, key_size=64, ffn_size=3072, vocab_size=16384
)
CASES = ((1, 16), (2, 16), (4, 16), (8, 16), (16, 16), (1, 4000), (8, 4000))


def main() -> int:
    """Prints measurement, prediction and error of each case."""
    argparse.ArgumentParser(prog="python -m tools.bench.prediction", description=__doc__).parse_args()
    jax.config.update("jax_platforms", "cpu")
    for name, config in (("model", MID_SIZE), ("other", OTHER)):
        _compare(pathlib.Path("build/bench") / name, config)
    return 0


def _compare(directory: pathlib.Path, config: GrokConfig) -> None:
    make_checkpoint(directory, config)
    checkpoint = open_checkpoint(directory)
    engine = Engine(checkpoint, "int8", "bfloat16", 1, 4200)
    layout, precision = layout_of(config, 1, 1, "tensor"), Precision("int8")
    # Of a shared machine, both change from moment to moment: one figure each for the whole run.
    bandwidth = statistics.median(read_bandwidth(2) for _ in range(9))
    hardware = cpu_hosts(16e9, bandwidth, statistics.median(matmul_peak(3) for _ in range(5)), 1)
    title = f"{directory.name}, {bandwidth / 1e9:.1f} GB/s"
    print(f"{title:<32} {'measured':>9} {'predicted':>9} {'best':>9} {'worst':>9} {'error':>7}")
    errors = []

    def compare(name: str, seconds: float, predicted: Range) -> None:
        errors.append(predicted.middle / seconds - 1)
        shown = [f"{1e3 * value:>6.1f} ms" for value in (seconds, predicted.middle, predicted.best, predicted.worst)]
        print(f"{name:<32} {' '.join(shown)} {errors[-1]:>+7.1%}", flush=True)

    for batch, positions in CASES:
        steps = 24
        seconds, _ = engine.decode(batch, positions, steps)
        predicted = decode_seconds(config, layout, precision, hardware, batch, positions + steps // 2)
        compare(f"decode, batch {batch}, {positions} positions", seconds, predicted)
    pages = tuple(range(1, 1 + CHUNK // PAGE))
    seconds = statistics.median(engine.steps.prefill(0, pages, CHUNK) for _ in range(5))
    compare(f"prefill, {CHUNK} positions", seconds, prefill_seconds(config, layout, hardware, CHUNK, CHUNK))
    print(f"largest error {max(map(abs, errors)):.1%}, median {statistics.median(map(abs, errors)):.1%}")


if __name__ == "__main__":
    sys.exit(main())
