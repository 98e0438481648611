"""One engine behind a pipe: reads cases as JSON lines, answers with seconds. So that engines can be measured in turn.

python tools/bench/peer_steps.py ours CHECKPOINT WEIGHTS, or llama FILE.gguf, or xai CHECKPOINT CHECKOUT
The first runs in this project's environment, the second in one with llama-cpp-python, the third in one that xAI's code of
CHECKOUT runs in (jax 0.4.25, dm-haiku 0.0.12, sentencepiece).
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
    from tools.bench.engine import CHUNK, PAGE, Engine
    from workers.checkpoint.checkpoint import open_checkpoint

    engine = Engine(open_checkpoint(pathlib.Path(checkpoint)), weights, "bfloat16", 1, CONTEXT)

    def run(case: dict[str, Any]) -> dict[str, float]:
        if case["kind"] == "prefill":
            return {"seconds": engine.steps.prefill(0, tuple(range(1, 1 + CHUNK // PAGE)), case["positions"])}
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
        prefill(0, case["positions"])
        for sequence in range(1, batch):
            api.llama_memory_seq_cp(memory, 0, sequence, 0, case["positions"])
        for i in range(case["steps"]):
            began = time.perf_counter()
            decode([500 + 11 * i + s for s in range(batch)], [case["positions"] + i] * batch, range(batch), batch)
            times.append(time.perf_counter() - began)
        return {"seconds": statistics.median(times)}

    return run


def xai(checkpoint: str, checkout: str) -> Callable[[dict[str, Any]], dict[str, float]]:
    """xAI's own code, which serves one request at a time: its prefill of a bucket of 512, and its steps."""
    import importlib
    import pathlib

    sys.path.insert(0, checkout)
    model: Any = importlib.import_module("model")
    runners: Any = importlib.import_module("runners")
    given = json.loads((pathlib.Path(checkpoint) / "config.json").read_text())
    sizes = ("emb_size", "key_size", "num_q_heads", "num_kv_heads", "num_layers", "num_experts", "num_selected_experts")
    layers = model.TransformerConfig(
        **{name: given[name] for name in (*sizes, "attn_output_multiplier")},
        widening_factor=1.5 * given["ffn_size"] / given["emb_size"],
        shard_activations=True,
        data_axis="data",
        model_axis="model",
    )
    names = ("vocab_size", "sequence_len", "pad_token", "eos_token")
    scales = ("embedding_multiplier_scale", "output_multiplier_scale")
    language = model.LanguageModelConfig(model=layers, **{name: given[name] for name in (*names, *scales)})
    runner = runners.InferenceRunner(
        pad_sizes=(512,),
        runner=runners.ModelRunner(model=language, bs_per_device=1, checkpoint_path=checkpoint),
        name="peer",
        load=checkpoint,
        tokenizer_path=f"{checkpoint}/tokenizer.model",
    )
    runner.initialize()
    server = runner.run()

    def request(tokens: int) -> float:
        """Seconds of a request: a prefill and `tokens` steps."""
        next(server)
        began = time.perf_counter()
        server.send(runners.Request(prompt="a b c", temperature=1.0, nucleus_p=1.0, rng_seed=1, max_len=tokens))
        return time.perf_counter() - began

    def run(case: dict[str, Any]) -> dict[str, float]:
        short, more = request(2), 4
        step = (request(2 + more) - short) / more
        return {"seconds": step if case["kind"] == "decode" else short - 2 * step}

    return run


def main() -> None:
    """Answers until the pipe ends."""
    engines: dict[str, Callable[..., Callable[[dict[str, Any]], dict[str, float]]]]
    engines = {"ours": ours, "llama": llama, "xai": xai}
    run = engines[sys.argv[1]](*sys.argv[2:])
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever libraries print
    print(json.dumps({"ready": True}), file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps(run(json.loads(line))), file=answers, flush=True)


if __name__ == "__main__":
    main()
