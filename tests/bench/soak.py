"""A million tokens through gateway, leader and scheduler, with a mesh that computes nothing: does memory grow?

python -m tests.bench.soak
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import multiprocessing
import random
import time
import unittest.mock
from collections.abc import Iterator
from typing import Any

from opentelemetry import trace

from cluster.client import AsyncClient
from cluster.config import Config, GatewaySection, ModelSection
from cluster.gateway.latency import RecentLatency
from cluster.gateway.router import LeaderAddress, Router
from cluster.gateway.server import Gateway
from cluster.gateway.validation import Limits
from tests.bench.processes import resident
from tests.conftest import DEMO
from tests.fake_mesh import leading
from workers.engine.plan import EngineShape
from workers.grammar import Grammars
from workers.link import free_port
from workers.model.config import GrokConfig
from workers.tokenizer import Tokenizer

SHAPE = EngineShape(slots=16, groups=1, pages=257, page_size=16, chunk=64, context=512, exact_rows=True)
CLIENTS = 24


async def _serve(address: str, seconds: float) -> None:
    model, tokenizer = GrokConfig.load(DEMO / "config.json"), Tokenizer(DEMO / "tokenizer.model")
    limits = Limits(model, SHAPE.context, Grammars(tokenizer, model.vocab_size, model.eos_token))
    config = Config(ModelSection("demo", str(DEMO)), gateway=GatewaySection(address))
    router = Router(patience=0)
    status: Any = unittest.mock.Mock()  # nobody asks for it
    gateway = Gateway(config, None, limits, tokenizer, router, RecentLatency(), status, trace.NoOpTracer())
    await gateway.start()
    with leading(SHAPE, model.vocab_size, 512, seconds) as leader:
        await router.serve(LeaderAddress(0, 1, leader, b"s"), lambda: None)


def _run(address: str, seconds: float) -> None:
    asyncio.run(_serve(address, seconds))


@contextlib.contextmanager
def serving(seconds: float = 0.0) -> Iterator[tuple[str, int]]:
    """Address and process of gateway and leader on a mesh that computes nothing in steps of `seconds`, for the block."""
    address = f"127.0.0.1:{free_port('127.0.0.1')}"
    process = multiprocessing.get_context("spawn").Process(target=_run, args=(address, seconds), daemon=True)
    process.start()
    assert process.pid is not None
    try:
        yield address, process.pid
    finally:
        process.kill()


async def _generate(address: str, tokens: int, pid: int) -> list[tuple[int, float]]:
    """Has so many tokens drawn by requests of all lengths, some of which are given up; memory after each tenth, in MiB."""
    drawn = sent = 0
    samples: list[tuple[int, float]] = []

    async def client(rng: random.Random) -> None:
        nonlocal drawn, sent
        async with AsyncClient(address) as client:
            while drawn < tokens:
                sent += 1
                prompt = [rng.randrange(3, 2000) for _ in range(rng.randint(1, 100))]
                leave = rng.randint(1, 300) if rng.random() < 0.1 else None
                count = 0
                async for part in client.generate(prompt, max_tokens=rng.randint(1, 400), ignore_eos=True):
                    count += len(part.tokens)
                    if leave is not None and count >= leave:
                        break
                drawn += count
                if drawn * 10 // tokens > len(samples):
                    samples.append((drawn, resident(pid)))

    await asyncio.gather(*(client(random.Random(i)) for i in range(CLIENTS)))
    print(f"{sent} requests, {drawn} tokens")
    return samples


def main() -> None:
    """Prints the memory of the process that has all the parts, and its growth a million tokens, from the first third on."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=1_000_000, help="to draw (default: %(default)s)")
    arguments = parser.parse_args()
    began = time.monotonic()
    with serving() as (address, pid):
        samples = asyncio.run(_generate(address, arguments.tokens, pid))
    for drawn, memory in samples:
        print(f"{drawn:>9} tokens  {memory:7.1f} MiB")
    (first, low), (last, high) = samples[len(samples) // 3], samples[-1]
    slope = (high - low) / (last - first) * 1e6
    print(f"{slope:+.1f} MiB a million tokens; {arguments.tokens / (time.monotonic() - began):.0f} tokens/s")


if __name__ == "__main__":
    main()
