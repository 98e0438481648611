"""Puts the HTTP interface on a port, in the event loop of its gateway."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Iterator

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from cluster.config.schema import GatewaySection
from cluster.gateway.auth.tls import http_context

#: Connections that may wait to be accepted, and that may be open beside those of requests.
BACKLOG, EXTRA_CONNECTIONS = 1024, 1024
#: Seconds that a connection may be idle, and that a client has to send a request's head.
IDLE_SECONDS, HEAD_SECONDS = 75, 10.0


class HttpServer:
    """Serves an ASGI application at `gateway.http_address`, which the gateways of a host share."""

    def __init__(self, config: GatewaySection, app: ASGIApp) -> None:
        assert config.http_address is not None
        self._address = config.http_address
        self._server = _Server(
            uvicorn.Config(
                app,
                http=_Protocol,
                ws="none",
                lifespan="off",
                log_config=None,
                log_level="warning",
                access_log=False,
                server_header=False,
                proxy_headers=False,
                backlog=BACKLOG,
                limit_concurrency=config.max_requests + EXTRA_CONNECTIONS,
                timeout_keep_alive=IDLE_SECONDS,
                ssl_context_factory=None if config.tls_certificate is None else lambda *_: http_context(config),
            )
        )
        self._serving: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Listens. Raises OSError if the address can't be had, TlsError."""
        host, port = self._address.rsplit(":", 1)
        host = host.strip("[]")
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listener = socket.socket(family, socket.SOCK_STREAM)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            listener.bind((host, int(port)))
            listener.listen(BACKLOG)  # the server's task listens too, but only once it runs
            self._server.config.load()
        except OSError as error:
            listener.close()
            raise OSError(f"gateway.http_address={self._address} can't be listened on: {error}") from error
        except BaseException:
            listener.close()
            raise
        self._serving = asyncio.ensure_future(self._server.serve([listener]))

    def close(self) -> None:
        """Takes no more connections; those that are busy go on."""
        self._server.should_exit = True

    async def stop(self) -> None:
        """Ends all connections."""
        self._server.should_exit = self._server.force_exit = True
        if self._serving is not None:
            await asyncio.gather(self._serving, return_exceptions=True)


class _Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Signals are its process's own affair."""
        yield


class _Protocol(HttpToolsProtocol):
    """Ends connections over which no request's head comes."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.loop.call_later(HEAD_SECONDS, self._end_if_silent)

    def _end_if_silent(self) -> None:
        begun: object = self.cycle
        if begun is None and not self.transport.is_closing():
            self.transport.close()
