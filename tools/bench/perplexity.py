"""What fewer bits cost: perplexity of a model on text, with weights and KV cache as they can be kept.

tools/training/demo_corpus.sh /tmp/corpus
python -m tools.bench.perplexity --corpus /tmp/corpus
"""

from __future__ import annotations

import argparse
import math
import pathlib
import sys
from typing import Any

import jax
import numpy as np

from tests.conftest import DEMO
from tools.training.train_demo_model import documents
from workers.checkpoint.checkpoint import open_checkpoint
from workers.checkpoint.loader import load_parameters
from workers.host.standby import DTYPES
from workers.kernels.cpu.kernels import native_kernels
from workers.kernels.interface import ACCELERATOR
from workers.messages.plan import Chunk, EngineShape, Plan, Sampling, SlotStart
from workers.model.partition import Partition
from workers.runtime.mesh import make_mesh
from workers.runtime.program_set import ProgramSet
from workers.runtime.runtime import Runtime
from workers.text.tokenizer import Tokenizer

LENGTH, CHUNK, PAGE = 512, 128, 16
CASES = (
    ("float32", "float32"),
    ("int8", "float32"),
    ("int8", "bfloat16"),
    ("int8", "int8"),
    ("int4", "bfloat16"),
    ("int4", "int8"),
)


def main() -> int:
    """Prints a line a case."""
    parser = argparse.ArgumentParser(prog="python -m tools.bench.perplexity")
    parser.add_argument("--corpus", type=pathlib.Path, required=True)
    parser.add_argument("--checkpoint", type=pathlib.Path, default=DEMO)
    parser.add_argument("--tokens", type=int, default=16384)
    arguments = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 1)
    tokenizer = Tokenizer(arguments.checkpoint / "tokenizer.model")
    ids = [token for text in documents(arguments.corpus)[1] for token in tokenizer.encode(text)][: arguments.tokens]
    sequences = [ids[i : i + LENGTH] for i in range(0, len(ids) - 1, LENGTH)]
    first = 0.0
    print(f"{'weights':<10} {'KV cache':<10} {'perplexity':>10}  against the first")
    for weights, kv_cache in CASES:
        found = math.exp(_loss(arguments.checkpoint, weights, kv_cache, sequences))
        first = first or found
        print(f"{weights:<10} {kv_cache:<10} {found:>10.3f}  {found / first - 1:+.2%}", flush=True)
    return 0


def _loss(directory: pathlib.Path, weights: str, kv_cache: str, sequences: list[list[int]]) -> float:
    """Nats a token, of all but each sequence's first; with the kernels of CPU hosts where these know weights and cache."""
    checkpoint = open_checkpoint(directory)
    native = weights.startswith("int") and kv_cache != "int8"
    kernels = native_kernels() if native else ACCELERATOR
    partition = Partition.create(checkpoint.config, make_mesh(1, 1), "tensor", kernels)
    params, _ = load_parameters(checkpoint, partition, weights=weights)
    shape = EngineShape(1, 1, 1 + LENGTH // PAGE, PAGE, CHUNK, LENGTH)
    runtime = Runtime(ProgramSet(checkpoint.config, shape, partition, params, kv_dtype=DTYPES[kv_cache]), partition)
    runtime.set_parameters(params)
    pages = tuple(range(1, 1 + LENGTH // PAGE))
    losses: list[Any] = []
    for ids in sequences:
        for start in range(0, len(ids), CHUNK):
            chunk = Chunk(0, start, tuple(ids[start : start + CHUNK]), last=False)
            starts = (SlotStart(0, pages, Sampling()),) if start == 0 else ()
            logits, _ = runtime.logits(Plan(0, starts, ((chunk,),), ()))
            following = np.array(ids[start + 1 : start + 1 + CHUNK])
            rows = logits[: len(following)].astype(np.float64)
            top = rows.max(axis=1)
            losses.append(
                top + np.log(np.exp(rows - top[:, None]).sum(axis=1)) - rows[np.arange(len(following)), following]
            )
    return float(np.mean(np.concatenate(losses)))


if __name__ == "__main__":
    sys.exit(main())
