"""One engine behind a pipe: reads cases as JSON lines, answers with seconds. So that engines can be measured in turn.

python tests/bench/peer_steps.py ours CHECKPOINT WEIGHTS | python tests/bench/peer_steps.py llama FILE.gguf
The second runs in an environment with llama-cpp-python, the first in this project's.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

CONTEXT = 8192
SLOTS = 8


def ours(checkpoint: str, weights: str) -> Callable[[dict[str, Any]], dict[str, float]]:
    """The engine of this project, keys and values in bfloat16."""
    import pathlib

    import jax

    jax.config.update("jax_platforms", "cpu")
    from workers.bench.engine import CHUNK, PAGE, Engine
    from workers.checkpoint.checkpoint import open_checkpoint

    engine = Engine(open_checkpoint(pathlib.Path(checkpoint)), weights, "bfloat16", 1, CONTEXT)

    def run(case: dict[str, Any]) -> dict[str, float]:
        if case["kind"] == "prefill":
            return {"seconds": engine.prefill(0, tuple(range(1, 1 + CHUNK // PAGE)), case["positions"])}
        seconds, read = engine.decode(case["batch"], case["positions"], case["steps"])
        return {"seconds": seconds, "bytes": read}

    return run


def llama(path: str) -> Callable[[dict[str, Any]], dict[str, float]]:
    """llama.cpp with as many threads as cores, keys and values in its default float16."""
    import ctypes
    import importlib

    api: Any = importlib.import_module("llama_cpp")

    @api.llama_log_callback  # type: ignore[untyped-decorator]
    def quiet(level: int, text: bytes, data: Any) -> None:
        pass

    api.llama_log_set(quiet, ctypes.c_void_p(0))
    api.llama_backend_init()
    model = api.llama_model_load_from_file(path.encode(), api.llama_model_default_params())
    params = api.llama_context_default_params()
    params.n_ctx, params.n_batch, params.n_ubatch, params.n_seq_max = SLOTS * CONTEXT + 8 * 1024, 512, 512, 2 * SLOTS
    params.n_threads = params.n_threads_batch = os.cpu_count() or 1
    params.kv_unified = True
    context = api.llama_init_from_model(model, params)
    memory = api.llama_get_memory(context)

    def decode(tokens: Sequence[int], positions: Sequence[int], sequences: Sequence[int], last: int) -> None:
        batch = api.llama_batch_init(len(tokens), 0, 1)
        batch.n_tokens = len(tokens)
        for i, token in enumerate(tokens):
            batch.token[i], batch.pos[i] = token, positions[i]
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, sequences[i]
            batch.logits[i] = i >= len(tokens) - last
        assert api.llama_decode(context, batch) == 0
        api.llama_synchronize(context)
        api.llama_batch_free(batch)

    def prefill(sequence: int, length: int) -> float:
        began = time.perf_counter()
        for start in range(0, length, 512):
            places = range(start, min(start + 512, length))
            decode([300 + (7 * i + sequence) % 30_000 for i in places], places, [sequence] * len(places), 1)
        return time.perf_counter() - began

    def run(case: dict[str, Any]) -> dict[str, float]:
        api.llama_memory_clear(memory, True)
        if case["kind"] == "prefill":
            return {"seconds": prefill(0, case["positions"])}
        batch, times = case["batch"], []
        for sequence in range(batch):
            prefill(sequence, case["positions"])
        for i in range(case["steps"]):
            began = time.perf_counter()
            decode([500 + 11 * i + s for s in range(batch)], [case["positions"] + i] * batch, range(batch), batch)
            times.append(time.perf_counter() - began)
        return {"seconds": statistics.median(times)}

    return run


def main() -> None:
    """Answers until the pipe ends."""
    run = ours(sys.argv[2], sys.argv[3]) if sys.argv[1] == "ours" else llama(sys.argv[2])
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever libraries print
    print(json.dumps({"ready": True}), file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps(run(json.loads(line))), file=answers, flush=True)


if __name__ == "__main__":
    main()
