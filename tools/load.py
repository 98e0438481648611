"""A load on a running service whose every answer is checked: under load each request must get the tokens that it gets alone.

python -m tools.load --address 127.0.0.1:50051 --clients 32 --requests 500
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import random
import sys
import time

from grok.serving.v1 import cluster_pb2
from grokmesh import AsyncClient, Options

PROMPTS = (
    "In the beginning",
    "And it came to pass",
    "HAMLET.\nTo be, or not to be: that is the question",
    "Blessed are the meek, for they shall inherit the earth. ",
    "ROMEO.\nBut soft, what light through yonder window breaks? It is the east, and Juliet is the sun.\n",
    "The Lord is my shepherd; I shall not want. He maketh me to lie down in green pastures: he leadeth me beside the still "
    "waters. He restoreth my soul: he leadeth me in the paths of righteousness for his name's sake. Yea, though I walk",
)


@dataclasses.dataclass(frozen=True)
class Case:
    """A request of the load."""

    prompt: str
    options: Options


@dataclasses.dataclass(frozen=True)
class Result:
    """What the load came to."""

    wrong: int
    tokens: int
    seconds: float
    status: cluster_pb2.GetStatusResponse


def cases(count: int, longest: int, seed: int) -> list[Case]:
    """Requests of mixed length: greedy ones and sampled ones, with filters, biases and stop texts among them."""
    rng = random.Random(seed)
    made = []
    for i in range(count):
        options: Options = {"max_tokens": rng.randint(1, longest), "seed": rng.getrandbits(64)}
        options["temperature"] = rng.choice([0.0, 0.7, 1.0, 1.5])
        if i % 3 == 0:
            options["top_p"] = rng.choice([0.5, 0.9])
        if i % 5 == 0:
            options["top_k"] = rng.randint(1, 40)
        if i % 7 == 0:
            options["logit_bias"] = {rng.randrange(2048): rng.uniform(-5, 5) for _ in range(3)}
        if i % 11 == 0:
            options["stop"] = [" the ", "\n"]
        repeats = rng.choice([1, 1, 1, 2, 4])
        made.append(Case(rng.choice(PROMPTS) * repeats, options))
    return made


async def ask(client: AsyncClient, case: Case) -> list[int]:
    """The tokens of a case's completion."""
    completion = await client.complete(case.prompt, **case.options)
    return [token.id for token in completion.tokens]


async def run(address: str, clients: int, load: list[Case]) -> Result:
    """Asks each request alone, then all with `clients` at once, and compares."""
    async with AsyncClient(address) as client:
        alone = [await ask(client, case) for case in load]
        places = asyncio.Semaphore(clients)

        async def one(case: Case) -> list[int]:
            async with places:
                return await ask(client, case)

        began = time.monotonic()
        together = await asyncio.gather(*(one(case) for case in load))
        seconds = time.monotonic() - began
        wrong = sum(a != b for a, b in zip(alone, together, strict=True))
        await asyncio.sleep(0.5)
        return Result(wrong, sum(map(len, together)), seconds, await client.status())


def main() -> int:
    """Exit code 1 if any answer differs, or slots, pages or compilations remain."""
    parser = argparse.ArgumentParser(description="Checks every answer of a loaded service.")
    parser.add_argument("--address", default="127.0.0.1:50051")
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--requests", type=int, default=500)
    parser.add_argument("--longest", type=int, default=48)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    load = cases(arguments.requests, arguments.longest, arguments.seed)
    result = asyncio.run(run(arguments.address, arguments.clients, load))
    running = sum(r.running + r.waiting + r.pages_used for r in result.status.replicas)
    compilations = sum(r.compilations for r in result.status.replicas)
    print(
        f"{len(load)} requests, {arguments.clients} clients: {result.wrong} differ from what they get alone; "
        f"{result.tokens} tokens in {result.seconds:.1f} s = {result.tokens / result.seconds:.0f} tokens/s; "
        f"slots, waiting and pages held afterwards: {running}; compilations since warm-up: {compilations}"
    )
    return 1 if result.wrong or running or compilations else 0


if __name__ == "__main__":
    sys.exit(main())
