"""Where Prometheus reads a worker's metrics."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, make_server

from prometheus_client import CollectorRegistry, make_wsgi_app

from workers.telemetry.bounded_server import BoundedServer


class _Handler(WSGIRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        """Says nothing of each request."""


def serve_metrics(address: str, ports: Iterable[int], registry: CollectorRegistry) -> BoundedServer:
    """Serves the metrics at the first of these ports of an address that is free. Raises OSError if none is."""
    for port in ports:
        with contextlib.suppress(OSError):
            server = make_server(address, port, make_wsgi_app(registry), BoundedServer, _Handler)
            server.serve_in_background("metrics")
            return server
    raise OSError(f"no port of {address} is free for metrics")
