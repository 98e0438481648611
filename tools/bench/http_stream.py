"""Processor time of a gateway for each event over HTTP, beside a message over gRPC, and beside a bare stream of FastAPI.

python -m tools.bench.http_stream
"""

from __future__ import annotations

import asyncio
import multiprocessing
import pathlib
import tempfile
import time
from collections.abc import AsyncIterator

import aiohttp
import uvicorn
from fastapi import FastAPI
from fastapi.responses import StreamingResponse

from tests.support.service import running
from tools.bench.processes import cpu_of_each
from tools.bench.stream import STREAMS, TOKENS, read_gateway
from workers.host.streams import free_port

_EVENT = (
    b'data: {"id":"cmpl-r-0123456789abcdef","created":1700000000,"model":"demo","object":"text_completion",'
    b'"choices":[{"index":0,"text":" word","logprobs":null,"finish_reason":null}]}\n\n'
)


def _serve_bare(port: int) -> None:
    app = FastAPI()

    async def events() -> AsyncIterator[bytes]:
        for _ in range(TOKENS):
            await asyncio.sleep(0.02)  # as long as a step of the demo
            yield _EVENT

    @app.post("/v1/completions")
    async def stream() -> StreamingResponse:
        return StreamingResponse(events(), media_type="text/event-stream")

    uvicorn.run(app, port=port, log_config=None, access_log=False)


async def _read_http(address: str) -> int:
    """Events of STREAMS streams."""
    async with aiohttp.ClientSession(f"http://{address}", connector=aiohttp.TCPConnector(limit=0)) as session:

        async def one(seed: int) -> int:
            body = {
                "model": "demo",
                "prompt": "And",
                "max_tokens": TOKENS,
                "seed": seed,
                "ignore_eos": True,
                "stream": True,
            }
            async with session.post("/v1/completions", json=body) as answer:
                answer.raise_for_status()
                return sum([line.startswith(b"data: {") async for line in answer.content])

        return sum(await asyncio.gather(*map(one, range(STREAMS))))


def main() -> None:
    """Prints microseconds a message, and ratios."""
    port, http_address = free_port("127.0.0.1"), f"127.0.0.1:{free_port('127.0.0.1')}"
    process = multiprocessing.get_context("spawn").Process(target=_serve_bare, args=(port,), daemon=True)
    process.start()
    assert process.pid is not None
    time.sleep(3)
    bare = cpu_of_each([process.pid], lambda: asyncio.run(_read_http(f"127.0.0.1:{port}")))
    process.kill()
    with (
        tempfile.TemporaryDirectory() as folder,
        running(pathlib.Path(folder), gateway={"http_address": http_address}, engine={"slots": STREAMS}) as service,
    ):
        pid = service.status().gateways[0].pid
        grpc = cpu_of_each([pid], lambda: asyncio.run(read_gateway(service.address, range(STREAMS))))
        http = cpu_of_each([pid], lambda: asyncio.run(_read_http(http_address)))
    print(f"bare FastAPI {bare * 1e6:.0f} us an event; gateway over gRPC {grpc * 1e6:.0f} us a message")
    print(f"gateway over HTTP {http * 1e6:.0f} us an event: {http / grpc:.2f} x gRPC, {http / bare:.2f} x bare")


if __name__ == "__main__":
    main()
