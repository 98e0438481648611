"""The whole service, gateway included, and llama-cpp-python's server under the same concurrent load, in one run.

python -m tools.bench.servers --llama-python PYTHON [--checkpoint DIR]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import pathlib
import subprocess
import tempfile
import time
from typing import Any

import aiohttp

from tests.support.service import running
from tools.bench.checkpoint import make_checkpoint
from tools.bench.service_load import Lengths, Load, Sample, run_load
from tools.bench.service_report import Objective, summarize
from tools.gguf_export import export_gguf
from workers.checkpoint.checkpoint import open_checkpoint
from workers.host.streams import free_port

CLIENTS, REQUESTS, PROMPT, COMPLETION = 16, 32, 128, 64
OBJECTIVE = Objective(time_to_first_token=5.0, time_per_output_token=0.5)


async def _load_llama(url: str) -> list[Sample]:
    samples: list[Sample] = []
    numbers = iter(range(REQUESTS))
    origin = time.perf_counter()
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=None)) as session:

        async def one(i: int) -> None:
            # Bytes are tokens of this model; a different beginning each time, so that no cache helps.
            text = f"{i:04d}" + "".join(chr(97 + (7 * i + j) % 26) for j in range(PROMPT - 5))
            body = {
                "prompt": text,
                "max_tokens": COMPLETION,
                "temperature": 1.0,
                "stream": True,
                "logit_bias": {"2": -100},
            }
            sample = Sample(time.perf_counter() - origin, PROMPT)
            samples.append(sample)
            async with session.post(f"{url}/v1/completions", json=body) as response:
                async for line in response.content:
                    if line.startswith(b"data: {"):
                        sample.tokens.append(time.perf_counter() - origin)
            sample.ended = time.perf_counter() - origin

        async def client() -> None:
            for i in numbers:
                await one(i)

        await asyncio.gather(*(client() for _ in range(CLIENTS)))
    return samples


def _llama(python: str, gguf: pathlib.Path) -> dict[str, Any]:
    port = free_port("127.0.0.1")
    command = [python, "-m", "llama_cpp.server", "--model", str(gguf), "--port", str(port), "--n_ctx", "4096"]
    command += ["--n_threads", str(os.cpu_count()), "--interrupt_requests", "false"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        return summarize(asyncio.run(_wait_and_load(f"http://127.0.0.1:{port}")), OBJECTIVE)
    finally:
        process.kill()
        process.wait()


async def _wait_and_load(url: str) -> list[Sample]:
    async with aiohttp.ClientSession() as session:
        for _ in range(120):
            try:
                async with session.get(f"{url}/v1/models"):
                    break
            except aiohttp.ClientError:
                await asyncio.sleep(0.5)
    return await _load_llama(url)


def _ours(checkpoint: pathlib.Path, hosts: int, weights: str) -> dict[str, Any]:
    load = Load(REQUESTS, CLIENTS, None, 0.0, Lengths(PROMPT, PROMPT), Lengths(COMPLETION, COMPLETION), 0, 1.0, 0)
    mesh = {"hosts": hosts, "devices_per_host": 1, "data": 1, "model": hosts}
    model = {"name": "bench", "checkpoint": str(checkpoint.resolve()), "weights": weights, "kv_cache": "bfloat16"}
    engine = {"context": 1024, "page_size": 64, "prefill_chunk": 512}
    with (
        tempfile.TemporaryDirectory() as folder,
        running(pathlib.Path(folder), mesh=mesh, model=model, engine=engine) as service,
    ):
        return summarize(asyncio.run(run_load(service.address, load)), OBJECTIVE)


def main() -> None:
    """Prints a line a server."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--llama-python", required=True)
    parser.add_argument("--checkpoint", type=pathlib.Path, default=pathlib.Path("build/bench/model"))
    parser.add_argument("--output", type=pathlib.Path)
    arguments = parser.parse_args()
    make_checkpoint(arguments.checkpoint)
    gguf = arguments.checkpoint / "model-q8_0.gguf"
    if not gguf.exists():
        export_gguf(open_checkpoint(arguments.checkpoint), gguf)
    results = {"llama-cpp-python's server": _llama(arguments.llama_python, gguf)}
    for hosts, weights in ((1, "int8"), (2, "int8"), (1, "int8-unrounded")):
        results[f"ours, {hosts} host(s), {weights}"] = _ours(arguments.checkpoint, hosts, weights)
    for name, summary in results.items():
        first = summary["time_to_first_token"]
        print(
            f"{name:<32} {summary['completion_tokens_per_second']:>7.1f} tokens/s, first token p50 {first['p50']:.2f} s, "
            f"p99 {first['p99']:.2f} s, a token p50 {summary['time_per_output_token']['p50'] * 1000:.0f} ms, "
            f"errors {summary['errors'] or 'none'}"
        )
    if arguments.output:
        arguments.output.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
