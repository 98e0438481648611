"""Processor time of gateways for each streamed message, beside a bare grpc.aio stream of the same messages.

python -m tools.bench.stream
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import functools
import multiprocessing
import pathlib
import tempfile
from collections.abc import AsyncIterator
from typing import Any

import grpc.aio

from grok.serving.v1 import generation_pb2
from grokmesh import AsyncClient
from tests.support.service import running
from tools.bench.processes import cpu_of_each
from workers.host.streams import free_port

STREAMS, TOKENS, CLIENTS = 16, 200, 16
_SERVICE, _METHOD = "bench.Stream", "Run"


def _serve_bare(port: int) -> None:
    message = generation_pb2.GenerateResponse(
        request_id="0" * 32, text=" word", tokens=[generation_pb2.GeneratedToken(id=300, logprob=-1.5)], seed=7
    )

    async def stream(request: bytes, context: Any) -> AsyncIterator[generation_pb2.GenerateResponse]:
        for _ in range(TOKENS):
            await asyncio.sleep(0.02)  # as long as a step of the demo
            yield message

    async def serve() -> None:
        server = grpc.aio.server()
        handler: Any = grpc.unary_stream_rpc_method_handler(
            stream, response_serializer=generation_pb2.GenerateResponse.SerializeToString
        )
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(_SERVICE, {_METHOD: handler}),))
        server.add_insecure_port(f"127.0.0.1:{port}")
        await server.start()
        await server.wait_for_termination()

    asyncio.run(serve())


async def _read_bare(port: int) -> int:
    """Messages of one client's only stream."""
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        await channel.channel_ready()
        method: Any = channel.unary_stream(f"/{_SERVICE}/{_METHOD}")
        return len([part async for part in method(b"")])


def _run_bare(port: int) -> int:
    return asyncio.run(_read_bare(port))


def _bare() -> float:
    """Seconds a message of the bare stream: as many streams as a gateway has, of as many clients."""
    context = multiprocessing.get_context("spawn")
    port = free_port("127.0.0.1")
    process = context.Process(target=_serve_bare, args=(port,), daemon=True)
    process.start()
    assert process.pid is not None
    with concurrent.futures.ProcessPoolExecutor(STREAMS, context) as clients:
        seconds = cpu_of_each([process.pid], lambda: sum(clients.map(_run_bare, [port] * STREAMS)))
    process.kill()
    return seconds


async def read_gateway(address: str, seeds: range) -> int:
    """Messages of the streams of one client."""
    async with AsyncClient(address) as client:

        async def one(seed: int) -> int:
            parts = client.generate("And", max_tokens=TOKENS, seed=seed, ignore_eos=True)
            return len([part async for part in parts])

        return sum(await asyncio.gather(*(one(seed) for seed in seeds)))


def _read(address: str, client: int, streams: int) -> int:
    """Messages of one client's streams, of so many streams in all."""
    return asyncio.run(read_gateway(address, range(client, streams, CLIENTS)))


def _gateways(processes: int) -> float:
    """Seconds a message, of all gateways of a host together, each with STREAMS; the best of three rounds."""
    context = multiprocessing.get_context("spawn")
    streams, gateway = STREAMS * processes, {"processes": processes}
    engine = {"slots": streams}
    with (
        tempfile.TemporaryDirectory() as folder,
        running(pathlib.Path(folder), gateway=gateway, engine=engine) as service,
    ):
        service.wait_for(lambda status: sum(one.listening for one in status.gateways) == processes, 60)
        pids = [gateway.pid for gateway in service.status().gateways]
        # Of a process all streams would go over one connection, to one gateway.
        with concurrent.futures.ProcessPoolExecutor(CLIENTS, context) as clients:
            read = functools.partial(
                clients.map, _read, [service.address] * CLIENTS, range(CLIENTS), [streams] * CLIENTS
            )
            return cpu_of_each(pids, lambda: sum(read()))


def main() -> None:
    """Prints microseconds a message of 1, 2 and 4 gateways and of the bare stream, and their ratios."""
    bare = _bare()
    print(f"bare grpc.aio: {bare * 1e6:.0f} us a message")
    for processes in (1, 2, 4):
        seconds = _gateways(processes)
        print(f"{processes} gateways: {seconds * 1e6:.0f} us a message, {seconds / bare:.2f} x", flush=True)


if __name__ == "__main__":
    main()
