"""Ten thousand hostile requests of all kinds beside sixteen ordinary streams, on a running service that reports its stalls.

python -m tools.bench.hostile --address 127.0.0.1:50051 --logs LOG /tmp/grokmesh-$UID/ray/session_latest/logs/worker-*.err
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import concurrent.futures
import json
import math
import multiprocessing
import os
import pathlib
import random
import re
import time
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import grpc
import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc

from grok.serving.v1 import generation_pb2
from grokmesh import AsyncClient, completion_request
from tools.bench.processes import resident

STREAMS, ATTACKERS = 16, 32
#: Seconds of ordinary streams alone, before and after.
CALM_SECONDS = 20.0
_SERVICE = "/grok.serving.v1.GenerationService/"
_VOCABULARY = 2048
_STALL = re.compile(r"(the \S+ loop) stood still for (\d+) ms, (\d+) of them computing, in ([^\"]+)")


def schemas(rng: random.Random) -> Iterator[str]:
    """JSON schemas that cost much, can't be followed, or are none."""
    yield json.dumps(
        {"type": "integer", "multipleOf": rng.choice([250_007, 999_983, 86_400_000, 16_777_216, 99_999_989])}
    )
    yield json.dumps({"type": "object", "properties": {f"p{i}": {} for i in range(rng.randint(200, 2000))}})
    yield json.dumps({"allOf": [{"pattern": f"{'.*'.join('abc'[: rng.randint(1, 3)])}{{{i},9}}"} for i in range(16)]})
    yield json.dumps({"patternProperties": {f"^.*{i}.*x{i}$": {"type": "string"} for i in range(rng.randint(10, 199))}})
    yield '{"$ref":"#/$defs/n","$defs":{"n":{"type":"object","properties":{"c":{"$ref":"#/$defs/n"}},"required":["c"]}}}'
    yield rng.choice(
        ["true", "false", '{"const": NaN}', '{"maximum": 1e400}', '{"const":"\\ud800"}', '{"$ref":"#"}', "[", "3"]
    )
    yield '{"properties":{"a":' * rng.randint(60, 3000)
    yield json.dumps({"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 10.0 ** -rng.randint(1, 300)})
    yield json.dumps({"anyOf": [{"multipleOf": p} for p in rng.sample(range(3, 3000), rng.randint(2, 300))]})


def expressions(rng: random.Random) -> Iterator[str]:
    """Regular expressions of the same kinds."""
    yield f"(a{{{rng.randint(100, 1000)}}}){{{rng.randint(100, 1000)}}}"
    yield f"a{{{rng.randint(1000, 200_000)}}}"
    yield "(" * rng.randint(1, 2000)
    yield "a" * rng.randint(900, 60_000) + "("
    yield "|".join(f"{i}.*{i}" for i in range(rng.randint(10, 2000)))
    yield f"(.*a){{{rng.randint(1, 300)}}}"
    yield rf"\p{{L}}{{1,{rng.randint(1, 1000)}}}"


def completions(rng: random.Random) -> Iterator[generation_pb2.Completion]:
    """Completions that are wrong, large or costly."""
    yield completion_request("x", max_tokens=8, json_schema=rng.choice(list(schemas(rng))))
    yield completion_request("x", max_tokens=8, regex=rng.choice(list(expressions(rng))))
    yield completion_request("x", max_tokens=4, choice=[f"text {i}" for i in range(rng.randint(1, 4000))])
    yield completion_request("x", max_tokens=4, regex="[0-9]{3}", allowed_tokens=[rng.randrange(_VOCABULARY)])
    stops = completion_request("x", max_tokens=4)
    stops.stop.extend([""] * rng.randint(17, 300_000))
    yield stops
    yield completion_request(
        "x", logit_bias={rng.randrange(9999): rng.choice([1e9, math.nan, 5.0]) for _ in range(999)}
    )
    resumed = completion_request(
        "x", max_tokens=rng.randint(400, 500), seed=1, stop=["the lion " * 100 + str(i) for i in range(16)]
    )
    resumed.resume.ids.extend(rng.choices(range(3, _VOCABULARY), k=rng.randint(1, 399)))
    yield resumed
    yield completion_request("a" * rng.randint(1, 400_000), max_tokens=4)
    yield completion_request([rng.randrange(2 * _VOCABULARY) for _ in range(rng.randint(1, 5000))], max_tokens=4)
    yield completion_request("x", n=rng.randint(2, 17), max_tokens=rng.randint(1, 60), top_logprobs=8, ignore_eos=True)
    yield completion_request(
        "x", temperature=rng.choice([math.nan, -1.0, 1e-45]), top_p=rng.choice([0.0, 2.0, math.nan])
    )


def messages(rng: random.Random) -> Iterator[tuple[str, bytes]]:
    """Calls as they travel: methods and messages, most of them small, some of megabytes."""
    for completion in completions(rng):
        yield "GenerateOnce", generation_pb2.GenerateOnceRequest(completion=completion).SerializeToString()
    size = int(10 ** rng.uniform(1, 6.6)) if rng.random() < 0.2 else int(10 ** rng.uniform(1, 4.5))
    text = rng.choice(["a", "\n", "hello world ", "\u6771\u4eac", "\U0001f600"])
    yield "Tokenize", generation_pb2.TokenizeRequest(text=text * (size // len(text.encode()))).SerializeToString()
    yield "CountTokens", generation_pb2.CountTokensRequest(text=text * (size // len(text.encode()))).SerializeToString()
    yield "Detokenize", generation_pb2.DetokenizeRequest(ids=[rng.randrange(3000)] * size).SerializeToString()
    yield rng.choice(["GenerateOnce", "Tokenize", "GetModel"]), rng.randbytes(rng.randint(0, 5000))
    yield "Nothing", b""


async def _attack(address: str, count: int, seed: int, outcomes: collections.Counter[str]) -> None:
    """Sends so many requests, some with short deadlines, some given up at once."""
    rng = random.Random(seed)
    async with grpc.aio.insecure_channel(address, options=[("grpc.max_receive_message_length", -1)]) as channel:
        sent = 0
        while sent < count:
            chosen = list(messages(rng))
            rng.shuffle(chosen)
            for method, message in chosen[: count - sent]:
                sent += 1
                ask: Any = channel.unary_unary(_SERVICE + method)
                call = ask(message, timeout=rng.choice([0.05, 2.0, 60.0, 60.0]))
                if rng.random() < 0.1:
                    await asyncio.sleep(rng.random() * 0.05)
                    call.cancel()
                try:
                    await call
                    outcomes["OK"] += 1
                except grpc.RpcError as error:
                    failed: Any = error
                    outcomes[failed.code().name] += 1
                except asyncio.CancelledError:
                    outcomes["CANCELLED"] += 1


async def _stream(client: AsyncClient, seed: int, gaps: list[float], over: Callable[[], bool]) -> None:
    """Ordinary completions one after the other; seconds between their parts."""
    while not over():
        last = None
        async for _ in client.generate("In the beginning", max_tokens=200, ignore_eos=True, seed=seed):
            now = time.monotonic()
            if last is not None:
                gaps.append(now - last)
            last = now


async def _health(address: str, silences: list[float], over: Callable[[], bool]) -> None:
    async with grpc.aio.insecure_channel(address) as channel:
        stub: Any = health_pb2_grpc.HealthStub(channel)
        while not over():
            began = time.monotonic()
            await stub.Check(health_pb2.HealthCheckRequest(), timeout=60)
            silences.append(time.monotonic() - began)
            await asyncio.sleep(0.02)


async def _observe(address: str, during: Callable[[], Awaitable[None]]) -> tuple[list[float], list[float]]:
    """Gaps of the ordinary streams and times of health checks while something runs."""
    gaps: list[float] = []
    silences: list[float] = []
    done = False
    async with AsyncClient(address) as client:
        watching = [
            asyncio.ensure_future(work)
            for work in (
                *(_stream(client, seed, gaps, lambda: done) for seed in range(STREAMS)),
                _health(address, silences, lambda: done),
            )
        ]
        await during()
        done = True
        await asyncio.gather(*watching)
    return gaps, silences


def _quantile(values: list[float], fraction: float) -> float:
    return sorted(values)[min(int(fraction * len(values)), len(values) - 1)] * 1e3


async def _epochs(address: str) -> list[int]:
    async with AsyncClient(address) as client:
        return [replica.epoch for replica in (await client.status()).replicas]


def _attackers(address: str, count: int, seed: int) -> collections.Counter[str]:
    """In a process of its own, so that making messages delays no measurement."""
    os.nice(15)

    async def all_of_them() -> collections.Counter[str]:
        outcomes: collections.Counter[str] = collections.Counter()
        await asyncio.gather(
            *(_attack(address, count // ATTACKERS, 1000 * seed + i, outcomes) for i in range(ATTACKERS))
        )
        return outcomes

    return asyncio.run(all_of_them())


def _stalls(logs: dict[pathlib.Path, int]) -> Iterator[tuple[str, int, int, str]]:
    """Which loop stood still for how many milliseconds, computing for how many of them, and where, by logs from their places
    on."""
    for path, place in logs.items():
        if not path.exists():
            continue
        with path.open(errors="replace") as log:
            log.seek(place)
            for found in _STALL.finditer(log.read()):
                yield found[1], int(found[2]), int(found[3]), found[4][:200]


def _show(name: str, values: list[float]) -> None:
    p50, p99 = (_quantile(values, fraction) for fraction in (0.5, 0.99))
    print(f"{name}: p50 {p50:.1f}, p99 {p99:.1f}, most {max(values) * 1e3:.0f} ms")


def main() -> None:
    """Prints how ordinary streams and health fared before and beside the attack, and the stalls that the logs name."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--address", default="127.0.0.1:50051")
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--logs", type=pathlib.Path, nargs="+", required=True, help="with telemetry.stall_seconds")
    parser.add_argument("--pid", type=int, required=True, help="of the gateway, for its memory")
    arguments = parser.parse_args()
    address = arguments.address
    before = asyncio.run(_epochs(address))
    calm, calm_health = asyncio.run(_observe(address, lambda: asyncio.sleep(CALM_SECONDS)))
    logs = {path: path.stat().st_size for path in arguments.logs}
    memory, began = resident(arguments.pid), time.monotonic()
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as pool:
        attack = pool.submit(_attackers, address, arguments.requests, arguments.seed)

        async def wait() -> None:
            await asyncio.to_thread(attack.result)

        gaps, health = asyncio.run(_observe(address, wait))
    outcomes = dict(attack.result().most_common())
    print(f"{arguments.requests} hostile requests in {time.monotonic() - began:.0f} s: {outcomes}")
    print(f"epochs {before} -> {asyncio.run(_epochs(address))}")
    print(f"gateway: {memory:.0f} -> {resident(arguments.pid):.0f} MiB")
    for name, values in (
        ("between tokens, calm", calm),
        ("between tokens, attacked", gaps),
        ("health, calm", calm_health),
        ("health, attacked", health),
    ):
        _show(name, values)
    stalls = sorted(_stalls(logs), key=lambda stall: -stall[2])
    for loop in ("the gateway's loop", "the leader's loop"):
        own = [stall for stall in stalls if stall[0] == loop]
        longest = max((stall[1] for stall in own), default=0)
        print(f"{loop}: {len(own)} stalls, longest {longest} ms, computing {own[0][2] if own else 0} ms at most")
        for _, took, used, where in own[:5]:
            print(f"  {took} ms, {used} computing: {where}")


if __name__ == "__main__":
    main()
