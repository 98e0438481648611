"""Sends requests to a service, in a closed or an open loop, and notes when each token came."""

from __future__ import annotations

import asyncio
import dataclasses
import random
import time
from collections.abc import Awaitable, Callable

import grpc

from grokmesh import AsyncClient, Tls

#: Prompt, tokens to draw, seed.
Work = tuple[list[int], int, int]
SendOne = Callable[[list[int], int, int], Awaitable[None]]


@dataclasses.dataclass(frozen=True)
class Lengths:
    """Evenly distributed whole numbers."""

    least: int
    greatest: int

    @classmethod
    def parse(cls, text: str) -> Lengths:
        """From `128` or `64:256`. Raises ValueError."""
        first, _, last = text.partition(":")
        lengths = cls(int(first), int(last or first))
        if not 1 <= lengths.least <= lengths.greatest:
            raise ValueError(f"{text}: expected a length, or the least and the greatest as 64:256")
        return lengths

    def draw(self, rng: random.Random) -> int:
        """One of them."""
        return rng.randint(self.least, self.greatest)


@dataclasses.dataclass(frozen=True)
class Load:
    """What is sent.

    Attributes:
      requests: how many in all.
      clients: of a closed loop: each sends its next request when the last one has ended. Of an open loop: the most requests at
        once, beyond which arrivals wait.
      rate: arrivals a second of an open loop, as a Poisson process; None for a closed loop.
      ramp: seconds over which clients, or the rate, grow to what they are to be.
      prompt, completion: tokens.
      shared_prefix: tokens that all prompts begin with.
      temperature: of the draws.
      seed: of lengths, prompts and arrivals.
    """

    requests: int
    clients: int
    rate: float | None
    ramp: float
    prompt: Lengths
    completion: Lengths
    shared_prefix: int
    temperature: float
    seed: int


@dataclasses.dataclass
class Sample:
    """One request: seconds since the load began, and what became of it. `tokens` are the times at which each one came."""

    began: float
    prompt: int
    tokens: list[float] = dataclasses.field(default_factory=list)
    ended: float = 0.0
    error: str = ""

    @property
    def time_to_first_token(self) -> float:
        """Seconds from sending the request."""
        return self.tokens[0] - self.began

    @property
    def time_per_output_token(self) -> float | None:
        """Seconds a token after the first; None if there was but one."""
        return (self.tokens[-1] - self.tokens[0]) / (len(self.tokens) - 1) if len(self.tokens) > 1 else None


async def run_load(address: str, load: Load, *, api_key: str | None = None, tls: Tls | None = None) -> list[Sample]:
    """Sends all requests and waits for their ends. Errors of requests are noted, not raised.

    Raises:
      grpc.RpcError: the service does not describe its model.
    """
    rng = random.Random(load.seed)
    async with AsyncClient(address, api_key=api_key, tls=tls, attempts=1) as client:
        model = await client.model()
        prefix = [rng.randrange(3, model.vocab_size) for _ in range(load.shared_prefix)]
        work = []
        for _ in range(load.requests):
            rest = load.prompt.draw(rng) - len(prefix)
            prompt = prefix + [rng.randrange(3, model.vocab_size) for _ in range(max(1, rest))]
            work.append((prompt, load.completion.draw(rng), rng.getrandbits(63)))
        origin = time.perf_counter()
        samples: list[Sample] = []

        async def one(prompt: list[int], length: int, seed: int) -> None:
            sample = Sample(time.perf_counter() - origin, len(prompt))
            samples.append(sample)
            try:
                parts = client.generate(
                    prompt, max_tokens=length, seed=seed, temperature=load.temperature, ignore_eos=True
                )
                async for part in parts:
                    sample.tokens += [time.perf_counter() - origin] * len(part.tokens)
            except grpc.RpcError as error:
                sample.error = error.code().name
            sample.ended = time.perf_counter() - origin

        if load.rate is None:
            await _closed(load, work, one)
        else:
            await _open(load, load.rate, rng, work, one)
        return samples


async def _closed(load: Load, work: list[Work], one: SendOne) -> None:
    queue = iter(work)

    async def client(i: int) -> None:
        await asyncio.sleep(load.ramp * i / load.clients)
        for request in queue:
            await one(*request)

    await asyncio.gather(*(client(i) for i in range(load.clients)))


async def _open(load: Load, rate: float, rng: random.Random, work: list[Work], one: SendOne) -> None:
    places = asyncio.Semaphore(load.clients)

    async def arrive(request: Work) -> None:
        async with places:
            await one(*request)

    began = time.perf_counter()
    async with asyncio.TaskGroup() as group:
        for request in work:
            grown = min(1.0, max(0.05, (time.perf_counter() - began) / load.ramp)) if load.ramp else 1.0
            await asyncio.sleep(rng.expovariate(rate * grown))
            group.create_task(arrive(request))
