"""The controller as a Ray actor, which outlives the processes that start and ask it, and how they reach it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import AsyncIterator
from typing import Any

import ray
import ray.exceptions

from cluster.config.schema import Config
from cluster.controller.controller import Controller
from cluster.controller.integrity import Digests
from cluster.controller.placement import answer
from cluster.controller.ray_placements import RayPlacements
from cluster.controller.view import GatewayReport, ServiceView
from cluster.telemetry import metrics
from workers.checkpoint.digests import read_record
from workers.checkpoint.storage import locate
from workers.host.actor import METRICS_PORTS
from workers.telemetry import logs
from workers.telemetry.metrics_server import serve_metrics

_LOG = logging.getLogger(__name__)

NAME = "controller"
#: Seconds that it may take to start.
START_SECONDS = 60.0
#: Seconds beyond its own that a call may take before the controller is taken to be away.
GRACE_SECONDS = 2.0
#: Seconds that ending all replicas may take.
END_SECONDS = 30.0


@ray.remote(num_cpus=0, max_restarts=-1)
class ControllerActor:
    """The controller's process. Ray starts it again wherever a node is left."""

    def __init__(self, config: Config) -> None:
        logs.configure()
        address = ray.util.get_node_ip_address()
        port = serve_metrics(address, (*METRICS_PORTS, 0), metrics.CONTROLLER).server_port
        placements = RayPlacements(config.mesh, config.cluster)
        metrics_url = f"http://{address}:{port}/metrics"
        digests = Digests(read_record(locate(config.model.checkpoint)))
        self._config = config
        self._controller = Controller(config, placements, digests, metrics_url)
        self._life: asyncio.Task[None] | None = None

    async def start(self) -> Config:
        """Begins its work, unless it has begun. What it serves."""
        # Not when it is made: a controller that Ray has started again has no loop until it is asked something.
        if self._life is None:
            self._life = asyncio.ensure_future(self._controller.run())
            self._life.add_done_callback(_end_with)
        return self._config

    async def sync(self, report: GatewayReport, version: tuple[str, int], seconds: float) -> ServiceView:
        await self.start()
        return await self._controller.sync(report, version, seconds)

    async def restart(self, replica: int) -> int:
        return await self._controller.restart(replica)

    async def profile(self, replica: int, steps: int, seconds: float) -> AsyncIterator[tuple[int, str, bytes]]:
        async for part in self._controller.profile(replica, steps, seconds):
            yield part

    async def end(self) -> None:
        """Ends all replicas."""
        if self._life is not None:
            self._life.remove_done_callback(_end_with)
            self._life.cancel()
            await asyncio.gather(self._life, return_exceptions=True)


def _end_with(life: asyncio.Task[None]) -> None:
    """A controller whose work has failed is started again by Ray."""
    _LOG.error("the controller's work has ended", exc_info=None if life.cancelled() else life.exception())
    os._exit(1)


class RayController:
    """A ControllerClient of the controller in this namespace. Raises OSError and RayError when it does not answer."""

    def __init__(self) -> None:
        self._actor: Any = None

    async def deploy(self, config: Config, *, anew: bool) -> None:
        """Starts the controller. One that is there already and serves the same stays as it is, unless it shall be made `anew`;
        else another one takes its place, and goes on with its meshes."""
        try:
            self._actor = await asyncio.to_thread(ray.get_actor, NAME)
            if not anew and await self._ask("start", START_SECONDS) == config:
                return
            await self._kill()
        except ValueError:  # there is none
            pass
        options: dict[str, Any] = {"name": NAME, "lifetime": "detached", "max_concurrency": 1000}
        self._actor = ControllerActor.options(**options).remote(config)  # type: ignore[attr-defined]
        await self._ask("start", START_SECONDS)

    async def end(self) -> None:
        """Ends all replicas and the controller."""
        with contextlib.suppress(OSError, ray.exceptions.RayError):
            await self._ask("end", END_SECONDS)
        await self._kill()

    async def sync(self, report: GatewayReport, version: tuple[str, int], seconds: float) -> ServiceView:
        view: ServiceView = await self._ask("sync", seconds + GRACE_SECONDS, report, version, seconds)
        return view

    async def restart(self, replica: int) -> int:
        epoch: int = await self._actor.restart.remote(replica)
        return epoch

    async def profile(self, replica: int, steps: int, seconds: float) -> AsyncIterator[tuple[int, str, bytes]]:
        async for part in self._actor.profile.options(num_returns="streaming").remote(replica, steps, seconds):
            yield await part

    async def _ask(self, method: str, seconds: float, *arguments: Any) -> Any:
        return await answer(getattr(self._actor, method).remote(*arguments), seconds, "the controller")

    async def _kill(self) -> None:
        """Ends the controller for good, and waits until its name is free."""
        ray.kill(self._actor)
        with contextlib.suppress(ValueError):
            while True:
                await asyncio.to_thread(ray.get_actor, NAME)
                await asyncio.sleep(0.05)
