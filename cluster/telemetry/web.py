"""The HTTP side of the gateway: metrics, Prometheus' service discovery, and the status page."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.resources
import urllib.parse
from collections.abc import Callable
from typing import Any

from aiohttp import web
from google.protobuf import json_format
from prometheus_client.exposition import choose_encoder

from cluster.telemetry import metrics
from grok.serving.v1 import cluster_pb2

#: Seconds that a successor waits for its predecessor to leave the address.
BIND_SECONDS = 20.0

Status = Callable[[], cluster_pb2.GetStatusResponse]


class WebServer:
    """Serves `/` (the status page), `/status.json`, `/metrics`, `/targets` (for Prometheus' http_sd_config), and for probes
    `/live`, which answers while the gateway's loop goes round, and `/ready`, which says whether a replica is in reach."""

    def __init__(self, address: str, status: Status, replicas: Callable[[], int]) -> None:
        """`replicas` gives the number of those that the gateway can send requests to."""
        host, port = address.rsplit(":", 1)
        self._host = host.strip("[]")
        self._port = int(port)
        self._status = status
        self._replicas = replicas
        application = web.Application()
        application.router.add_get("/", _page)
        application.router.add_get("/status.json", self._status_json)
        application.router.add_get("/metrics", _metrics)
        application.router.add_get("/targets", self._targets)
        application.router.add_get("/live", _live)
        application.router.add_get("/ready", self._ready)
        self._runner = web.AppRunner(application, access_log=None, shutdown_timeout=1.0)

    async def start(self, *, wait: bool = False) -> int:
        """Listens, and returns the port. Raises OSError if the address is taken; with `wait`, if it stays so."""
        await self._runner.setup()
        deadline = asyncio.get_running_loop().time() + (BIND_SECONDS if wait else 0.0)
        while True:
            site = web.TCPSite(self._runner, self._host, self._port)
            try:
                await site.start()
            except OSError as error:
                if asyncio.get_running_loop().time() < deadline:
                    await asyncio.sleep(0.1)
                    continue
                raise OSError(f"telemetry.address={self._host}:{self._port} can't be listened on: {error}") from error
            return int(self._runner.addresses[0][1])

    async def stop(self) -> None:
        with contextlib.suppress(RuntimeError):  # never started
            await self._runner.cleanup()

    async def _status_json(self, request: web.Request) -> web.Response:
        return web.json_response(json_format.MessageToDict(self._status(), always_print_fields_with_no_presence=True))

    async def _targets(self, request: web.Request) -> web.Response:
        return web.json_response(targets(self._status(), request.host))

    async def _ready(self, request: web.Request) -> web.Response:
        ready = self._replicas() > 0
        return web.Response(text="ready\n" if ready else "no replica is in reach\n", status=200 if ready else 503)


async def _live(request: web.Request) -> web.Response:
    return web.Response(text="alive\n")


def targets(status: cluster_pb2.GetStatusResponse, gateway: str) -> list[dict[str, Any]]:
    """What Prometheus is to scrape, in the form of its http_sd_config: the gateway at `gateway`, the others, the controller and
    every worker.

    Labels: `component` (gateway, controller or worker), `model`, and of workers `replica` and `rank`.
    """
    urls = {"controller": [status.controller_metrics_url], "gateway": [g.metrics_url for g in status.gateways]}
    found = [{"targets": [gateway], "labels": {"component": "gateway", "model": status.model}}]
    for component, its in urls.items():
        for url in its:
            if url and url != status.metrics_url:
                labels = {"component": component, "model": status.model}
                found.append({"targets": [urllib.parse.urlsplit(url).netloc], "labels": labels})
    for replica in status.replicas:
        for host in replica.hosts:
            labels = {"component": "worker", "model": status.model}
            labels |= {"replica": str(replica.index), "rank": str(host.rank)}
            found.append({"targets": [urllib.parse.urlsplit(host.metrics_url).netloc], "labels": labels})
    return found


async def _page(request: web.Request) -> web.Response:
    page = importlib.resources.files("cluster.telemetry").joinpath("status.html").read_text()
    policy = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'"
    return web.Response(text=page, content_type="text/html", headers={"Content-Security-Policy": policy})


async def _metrics(request: web.Request) -> web.Response:
    encode, content_type = choose_encoder(request.headers.get("Accept", ""))
    body: bytes = encode(metrics.REGISTRY)
    return web.Response(body=body, headers={"Content-Type": content_type})
