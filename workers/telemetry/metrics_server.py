"""Where Prometheus reads a worker's metrics."""

from __future__ import annotations

import contextlib
import socket
import socketserver
import threading
from collections.abc import Iterable
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from prometheus_client import CollectorRegistry, make_wsgi_app

#: Connections that are answered at once; more are closed. Each has two threads.
MAX_CONNECTIONS = 8
#: Seconds that a connection may last.
MAX_SECONDS = 5.0


class MetricsServer(socketserver.ThreadingMixIn, WSGIServer):
    """An HTTP server that costs a worker next to nothing, however many connect and whatever they send."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, *args: Any) -> None:
        self._places = threading.BoundedSemaphore(MAX_CONNECTIONS)
        super().__init__(*args)

    def process_request(self, request: Any, client_address: Any) -> None:
        """Answers in a thread of its own, if there is a place."""
        if not self._places.acquire(blocking=False):
            self.shutdown_request(request)
            return
        try:
            super().process_request(request, client_address)
        except RuntimeError:  # no more threads
            self._places.release()
            raise

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Answers, within MAX_SECONDS: a socket's timeout would begin anew with each byte."""
        timer = threading.Timer(MAX_SECONDS, _end, (request,))
        timer.daemon = True
        try:
            timer.start()
            super().process_request_thread(request, client_address)
        finally:
            timer.cancel()
            self._places.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """What a stranger's connection ends with is not worth a line."""


class _IPv6(MetricsServer):
    address_family = socket.AF_INET6


class _Handler(WSGIRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        """Says nothing of each request."""


def _end(connection: socket.socket) -> None:
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)


def serve_metrics(address: str, ports: Iterable[int], registry: CollectorRegistry) -> MetricsServer:
    """Serves the metrics at the first of these ports of an address that is free. Raises OSError if none is."""
    kind = _IPv6 if ":" in address else MetricsServer
    for port in ports:
        with contextlib.suppress(OSError):
            server = make_server(address, port, make_wsgi_app(registry), kind, _Handler)
            threading.Thread(target=server.serve_forever, daemon=True, name="metrics").start()
            return server
    raise OSError(f"no port of {address} is free for metrics")
