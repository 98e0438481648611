"""Workers' metrics can be read, and strangers at their port cost the worker nothing."""

from __future__ import annotations

import contextlib
import http.client
import socket
import threading
import urllib.request
from collections.abc import Iterator

import pytest
from prometheus_client import CollectorRegistry, Counter

from tests.support.waiting import wait_until
from workers.telemetry.bounded_server import BoundedServer
from workers.telemetry.metrics_server import serve_metrics


@pytest.fixture(params=["127.0.0.1", "::1"])
def server(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[BoundedServer]:
    """At an address of each kind, with short limits."""
    monkeypatch.setattr(BoundedServer, "seconds", 0.5)
    registry = CollectorRegistry()
    Counter("plans", "Plans.", registry=registry).inc(3)
    server = serve_metrics(request.param, (0,), registry)
    yield server
    server.shutdown()
    server.server_close()


def _scrape(server: BoundedServer) -> str:
    host, port = server.server_address[:2]
    shown = f"[{host!s}]" if ":" in str(host) else str(host)
    with urllib.request.urlopen(f"http://{shown}:{port}/metrics", timeout=5) as response:
        return str(response.read().decode())


def _scraped(server: BoundedServer) -> bool:
    with contextlib.suppress(OSError, http.client.HTTPException):
        return "plans_total 3.0" in _scrape(server)
    return False


def test_metrics_are_read_where_they_are_served(server: BoundedServer) -> None:
    assert _scraped(server)


def test_strangers_that_say_nothing_take_few_threads_and_soon_leave_their_places(server: BoundedServer) -> None:
    host, port = str(server.server_address[0]), server.server_address[1]
    before = threading.active_count()
    with contextlib.ExitStack() as strangers:
        for _ in range(100):
            connection = strangers.enter_context(socket.create_connection((host, port)))
            with contextlib.suppress(OSError):  # turned away already
                connection.sendall(b"GET /")
        assert threading.active_count() <= before + 2 * BoundedServer.connections
        wait_until(lambda: _scraped(server), 10)


def test_the_next_port_is_taken_when_one_is_not_free() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        with pytest.raises(OSError, match=r"no port of 127\.0\.0\.1 is free"):
            serve_metrics("127.0.0.1", (taken.getsockname()[1],), CollectorRegistry())
        server = serve_metrics("127.0.0.1", (taken.getsockname()[1], 0), CollectorRegistry())
        server.shutdown()
        server.server_close()
