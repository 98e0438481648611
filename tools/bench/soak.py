"""A million tokens through gateway, leader and scheduler, with a mesh that computes nothing: does memory grow?

python -m tools.bench.soak
"""

from __future__ import annotations

import argparse
import asyncio
import random
import time

from grokmesh import AsyncClient
from tests.support.fake_service import serving
from tools.bench.processes import resident

CLIENTS = 24


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
