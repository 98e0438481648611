"""The service under ten times the load that it can carry, with idle connections, and with clients that do not read.

python -m tools.bench.overload
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import os
import pathlib
import random
import resource
import tempfile
import time
from collections.abc import AsyncIterator

import grpc
import grpc.aio

from grok.serving.v1 import generation_pb2, generation_pb2_grpc
from grokmesh import completion_request
from tests.support.fake_service import serving
from tests.support.service import running
from tools.bench.processes import cpu_seconds, resident

TOKENS = 64
CLIENTS = 32
DEADLINE = 6.0
IDLE = 2000
#: What an HTTP/2 client says first, and empty settings.
_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes((0, 0, 0, 4, 0, 0, 0, 0, 0))


@dataclasses.dataclass
class Counts:
    """What became of requests."""

    completed: int = 0
    rejected: int = 0
    late: int = 0
    failed: int = 0
    rejections: list[float] = dataclasses.field(default_factory=list)

    def add(self, code: grpc.StatusCode | None, seconds: float) -> None:
        """Counts one by its status code, None for OK, and the time that it took."""
        if code is None:
            self.completed += 1
        elif code is grpc.StatusCode.RESOURCE_EXHAUSTED:
            self.rejected += 1
            self.rejections.append(seconds)
        elif code is grpc.StatusCode.DEADLINE_EXCEEDED:
            self.late += 1
        else:
            self.failed += 1


class Client:
    """Sends completions of TOKENS tokens."""

    def __init__(self, address: str) -> None:
        self._channel = grpc.aio.insecure_channel(address)
        self._stub = generation_pb2_grpc.GenerationServiceStub(self._channel)

    async def one(self, seed: int, counts: Counts, timeout: float | None = None) -> None:
        """One completion, read to its end."""
        completion = completion_request("And it came to pass", max_tokens=TOKENS, seed=seed, ignore_eos=True)
        began = time.monotonic()
        try:
            async for _ in self._stub.Generate(generation_pb2.GenerateRequest(completion=completion), timeout=timeout):
                pass
            counts.add(None, 0.0)
        except grpc.aio.AioRpcError as error:
            counts.add(error.code(), time.monotonic() - began)

    async def long(self, read: bool) -> None:
        """A long completion, of which only the first part is read or all of it."""
        completion = completion_request("And it", max_tokens=480, ignore_eos=True, top_logprobs=8)
        call = self._stub.Generate(generation_pb2.GenerateRequest(completion=completion))
        await call.read()
        try:
            if read:
                while await call.read() is not grpc.aio.EOF:
                    pass
            else:
                await asyncio.Event().wait()
        finally:
            call.cancel()

    async def close(self) -> None:
        """Ends the connection."""
        await self._channel.close()


async def closed_loop(address: str, seconds: float) -> float:
    """Completions a second of CLIENTS clients that each send the next when the last has ended."""
    client, counts = Client(address), Counts()
    began = time.monotonic()

    async def run(seed: int) -> None:
        while time.monotonic() - began < seconds:
            seed += CLIENTS
            await client.one(seed, counts)

    await asyncio.gather(*(run(i) for i in range(CLIENTS)))
    await client.close()
    return counts.completed / (time.monotonic() - began)


async def open_loop(address: str, rate: float, seconds: float) -> tuple[Counts, float]:
    """What becomes of requests with a deadline that come `rate` a second, and seconds until the last has ended."""
    client, counts, rng = Client(address), Counts(), random.Random(0)
    began = due = time.monotonic()
    sent: list[asyncio.Future[None]] = []
    while due - began < seconds:
        await asyncio.sleep(max(0.0, due - time.monotonic()))
        sent.append(asyncio.ensure_future(client.one(len(sent), counts, DEADLINE)))
        due += rng.expovariate(rate)
    await asyncio.gather(*sent)
    await client.close()
    return counts, time.monotonic() - began


@contextlib.asynccontextmanager
async def idle_connections(address: str, count: int) -> AsyncIterator[None]:
    """Connections that say Hello and nothing more, read as little as they must, while the block runs."""
    host, port = address.rsplit(":", 1)
    writers = []
    for _ in range(count):
        _, writer = await asyncio.open_connection(host, int(port))
        writer.write(_PREFACE)
        writers.append(writer)
    try:
        yield
    finally:
        for writer in writers:
            writer.close()


async def measure(address: str, gateway: int, seconds: float) -> None:
    """Prints the table of a service whose gateway is the process `gateway`."""
    await closed_loop(address, seconds / 3)  # warms up and teaches the forecast
    peak = await closed_loop(address, seconds)
    print(f"peak                     {peak:7.1f} completions/s of {TOKENS} tokens, {CLIENTS} clients in turn")
    before = resident(gateway)
    await open_loop(address, 10 * peak, seconds / 3)
    first = resident(gateway)
    cpu = [cpu_seconds(pid) for pid in (gateway, os.getpid())]
    counts, took = await open_loop(address, 10 * peak, seconds)
    shares = [(cpu_seconds(pid) - before) / took for pid, before in zip((gateway, os.getpid()), cpu, strict=True)]
    after = resident(gateway)
    good = counts.completed / took
    late = counts.late / max(counts.completed + counts.late, 1)
    print(f"offered                  {10 * peak:7.1f} /s with a deadline of {DEADLINE:g} s")
    print(f"goodput                  {good:7.1f} /s, {good / peak:.0%} of peak")
    print(f"cores                    {shares[0]:.2f} gateway, {shares[1]:.2f} this load, of {os.cpu_count()}")
    print(f"late of admitted         {late:7.2%} ({counts.late} of {counts.completed + counts.late})")
    slow = sorted(counts.rejections)[int(0.99 * len(counts.rejections))]
    print(
        f"rejected                 {counts.rejected:7d}, p99 {slow * 1e3:.1f} ms as the client sees it; {counts.failed} errors"
    )
    print(f"memory of the gateway    {before:7.0f} MiB before, {first:.0f} after a third, {after:.0f} at the end")
    async with idle_connections(address, IDLE):
        with_idle = await closed_loop(address, seconds / 2)
        print(f"with {IDLE} idle connections {with_idle:4.1f} /s, {with_idle / peak:.0%}; {resident(gateway):.0f} MiB")
    rates = []
    for read in (True, False):
        client = Client(address)
        calls = [asyncio.ensure_future(client.long(read)) for _ in range(8)]
        rates.append(await closed_loop(address, seconds / 2))
        for call in calls:
            call.cancel()
        await asyncio.gather(*calls, return_exceptions=True)
        await client.close()
    beside, unread = rates
    print(
        f"beside 8 unread streams  {unread:7.1f} /s, {unread / beside:.0%} of beside 8 read ones; {resident(gateway):.0f} MiB"
    )


def main() -> None:
    """Measures on a service of its own."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=30.0, help="of each measurement")
    parser.add_argument(
        "--step", type=float, help="of a mesh that computes nothing, in seconds; else the demo on this CPU"
    )
    arguments = parser.parse_args()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(max(soft, 8192), hard), hard))
    if arguments.step is not None:
        with serving(arguments.step) as (address, pid):
            asyncio.run(measure(address, pid, arguments.seconds))
        return
    mesh = {"hosts": 1, "devices_per_host": 1, "data": 1, "model": 1}
    with tempfile.TemporaryDirectory() as folder, running(pathlib.Path(folder), mesh=mesh) as service:
        asyncio.run(measure(service.address, service.process.pid, arguments.seconds))


if __name__ == "__main__":
    main()
