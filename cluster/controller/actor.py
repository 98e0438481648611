"""The controller as a Ray actor, which outlives the processes that start and ask it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from collections.abc import AsyncIterator
from typing import Any

import ray

from cluster.controller.client import NAME, RayController
from cluster.controller.controller import Controller
from cluster.controller.epochs import forget
from cluster.controller.gateways import Gateways
from cluster.controller.integrity import Digests
from cluster.controller.ray_calls import killed
from cluster.controller.ray_placements import RayPlacements
from cluster.controller.view import GatewayReport, ServiceView
from cluster.deployment import Deployment
from cluster.telemetry import metrics
from workers.checkpoint.digests import read_record
from workers.checkpoint.storage import locate
from workers.host.actor import METRICS_PORTS
from workers.telemetry import logs
from workers.telemetry.metrics_server import serve_metrics

_LOG = logging.getLogger(__name__)

#: Seconds that finding out what another controller has left may take.
SETTLE_SECONDS = 20.0
#: Seconds that Ray has in the end to kill workers.
KILL_SECONDS = 5.0


@ray.remote(num_cpus=0, max_restarts=-1)
class ControllerActor:
    """The controller's process. Ray starts it again, on another host if its own is gone."""

    def __init__(self, deployment: Deployment) -> None:
        logs.configure()
        config, address = deployment.config, ray.util.get_node_ip_address()
        port = serve_metrics(address, (*METRICS_PORTS, 0), metrics.CONTROLLER).server_port
        placements = RayPlacements(config.cluster)
        digests = Digests(read_record(locate(config.model.checkpoint)))
        self._deployment = deployment
        metrics_url = f"http://{address}:{port}/metrics"
        place = ServiceView(address=address, pid=os.getpid(), metrics_url=metrics_url, log=logs.path())
        self._controller = Controller((config, *deployment.smaller), placements, digests, place)
        self._controller.inherit(deployment.budgets, max(time.time() - deployment.budgets_at, 0.0))
        self._gateways = Gateways(deployment, lambda: self._controller.reports)
        self._life: asyncio.Future[Any] | None = None

    async def start(self) -> Deployment:
        """Begins its work, unless it has begun. What it serves."""
        # Not when it is made: one that Ray has started again has no loop until it is asked something.
        if self._life is None:
            self._life = asyncio.gather(self._controller.run(), self._gateways.run())
            self._life.add_done_callback(_end_with)
        return self._deployment

    async def sync(self, report: GatewayReport, version: tuple[str, int], seconds: float) -> ServiceView:
        await self.start()
        return await self._controller.sync(report, version, seconds)

    async def view(self) -> ServiceView:
        await self.start()
        return await self._controller.view()

    async def restart(self, replica: int) -> int:
        return await self._controller.restart(replica)

    async def profile(self, replica: int, steps: int, seconds: float) -> AsyncIterator[tuple[int, str, bytes]]:
        async for part in self._controller.profile(replica, steps, seconds):
            yield part

    async def inherit(self, budgets: dict[str, tuple[int, float]], seconds: float) -> None:
        self._controller.inherit(budgets, seconds)

    async def end(self) -> dict[str, tuple[int, float]]:
        """Drains gateways, then ends all replicas."""
        await self._gateways.end()
        if self._life is not None:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(SETTLE_SECONDS):
                    await self._controller.settled()
            self._life.remove_done_callback(_end_with)
            self._life.cancel()
            await asyncio.gather(self._life, return_exceptions=True)
            await killed(KILL_SECONDS)
            await forget()
        return self._controller.budgets()


def _end_with(life: asyncio.Future[Any]) -> None:
    """A controller whose work has failed is started again by Ray."""
    _LOG.error("the controller's work has ended", exc_info=None if life.cancelled() else life.exception())
    os._exit(1)


async def deploy(deployment: Deployment, *, anew: bool) -> Deployment:
    """Starts the controller; what it serves. One that is there already and serves the same stays as it is, unless it shall be
    made `anew`; else another one takes its place, and goes on with its meshes. Raises OSError, RayError."""
    controller = RayController()
    try:
        there = await controller.start()
        if there.config == deployment.config and not anew:
            return there
        await controller.kill()
    except OSError:  # there is none
        pass
    # Beside the gateways: a host that computes may be lost, and should not take the controller with it. Ray does not heed a
    # soft affinity of what needs no processor.
    here = {"label_selector": {"ray.io/node-id": ray.get_runtime_context().get_node_id()}}
    anywhere: dict[str, dict[str, str]] = {"label_selector": {}}
    options = {"name": NAME, "lifetime": "detached", "max_concurrency": 1000, **here, "fallback_strategy": [anywhere]}
    ControllerActor.options(**options).remote(deployment)  # type: ignore[attr-defined]
    return await controller.start()
