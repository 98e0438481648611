"""The HTTP interface on its port."""

from __future__ import annotations

import asyncio
import socket

from starlette.responses import Response

from cluster.config.schema import GatewaySection
from cluster.gateway.openai.server import HttpServer
from tests.support.ports import free_port


def test_a_server_that_has_started_takes_connections_at_once() -> None:
    port = free_port("127.0.0.1")

    async def check() -> None:
        server = HttpServer(GatewaySection(http_address=f"127.0.0.1:{port}"), Response())
        await server.start()
        socket.create_connection(("127.0.0.1", port), timeout=5).close()  # nothing else has run in this loop
        await server.stop()

    asyncio.run(check())
