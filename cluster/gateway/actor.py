"""A gateway as a Ray actor. Its event loop is its own: nothing that Ray does holds it up."""

from __future__ import annotations

import asyncio
import logging
import os
import threading
import time

import ray

from cluster.controller.client import RayController
from cluster.deployment import Deployment
from cluster.gateway.process import GatewayProcess
from workers.telemetry import logs

_LOG = logging.getLogger(__name__)

#: Seconds before a gateway that can't start is started again.
RETRY_SECONDS = 2.0


@ray.remote(num_cpus=0, max_restarts=-1)
class GatewayActor:
    """A gateway's process."""

    def __init__(self, deployment: Deployment, name: str, index: int) -> None:
        logs.configure()
        self._ready = threading.Event()
        self._arguments = deployment, name, index, ray.util.get_node_ip_address()
        self._process: GatewayProcess | None = None
        self._loop: asyncio.AbstractEventLoop
        self._thread = threading.Thread(target=self._run, name="gateway")
        self._thread.start()
        self._ready.wait()

    def stop(self) -> None:
        """Drains, and returns when it has ended."""
        if self._process is not None:
            self._loop.call_soon_threadsafe(self._process.stop)
        self._thread.join()

    def _run(self) -> None:
        try:
            asyncio.run(self._live())
        except Exception:
            _LOG.exception("the gateway has ended")
            self._ready.set()
            time.sleep(RETRY_SECONDS)
            os._exit(1)  # Ray starts it again

    async def _live(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._process = GatewayProcess(*self._arguments, RayController())
        self._ready.set()
        await self._process.run()
