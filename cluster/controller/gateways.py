"""The gateways of a service: as many processes on each of their hosts as are configured. Ray starts again what dies."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Sequence
from typing import Any

import ray
import ray.exceptions
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cluster.controller.ray_calls import answer, kill
from cluster.controller.view import GatewayReport
from cluster.deployment import Deployment
from cluster.gateway.actor import GatewayActor

_LOG = logging.getLogger(__name__)

_PREFIX = "gateway-"
#: Seconds between looks at the hosts.
LOOK_SECONDS = 1.0
#: Seconds that a gateway may take to end, beyond those that it has to drain.
END_SECONDS = 20.0


class Gateways:
    """Keeps them running, and replaces those of another deployment, one by one."""

    def __init__(self, deployment: Deployment, reports: Callable[[], Sequence[GatewayReport]]) -> None:
        self._deployment = deployment
        self._reports = reports
        #: By name: where each runs, and its handle.
        self._running: dict[str, tuple[str, Any]] = {}
        self._ending = False

    async def run(self) -> None:
        """Until cancelled. The gateways go on."""
        while True:
            try:
                if not self._ending:
                    await self._look()
            except (
                OSError,
                ValueError,
                ray.exceptions.RayError,
            ) as error:  # Ray's head is away, or a node has just gone
                _LOG.warning("gateways: %s", error)
            await asyncio.sleep(LOOK_SECONDS)

    async def end(self) -> None:
        """Drains and ends all of them, at once."""
        self._ending = True
        await asyncio.gather(*(self._stop(name) for name in await _names()))

    async def _look(self) -> None:
        gateway, nodes = self._deployment.config.gateway, await self._nodes()
        wanted = {
            f"{_PREFIX}{self._deployment.token}-{address}-{index}": (address, index)
            for address in nodes
            for index in range(gateway.processes)
        }
        there = await _names()
        for name, (address, index) in wanted.items():
            node, handle = self._running.get(name, (None, None))
            if name in there and node in (None, nodes[address]):
                self._running[name] = nodes[address], handle or await asyncio.to_thread(ray.get_actor, name)
                continue
            if name in there:  # it waits for a node that is gone
                await self._kill(name)
            self._running[name] = nodes[address], self._start(name, nodes[address], index)
        listening = {report.name for report in self._reports() if report.listening}
        for name in sorted(there - set(wanted)):
            # As many as there are of the new ones: an address is never without a gateway.
            if listening >= set(wanted):
                _LOG.info("%s is replaced", name)
                await self._stop(name)

    async def _nodes(self) -> dict[str, str]:
        """The Ray nodes of the hosts on which gateways run, by address."""
        alive = [node for node in await asyncio.to_thread(ray.nodes) if node["Alive"]]
        found: dict[str, str] = {}
        for node in sorted(alive, key=lambda node: str(node["NodeID"])):
            address = node["NodeManagerAddress"]
            if self._deployment.config.gateway.hosts == "all" or address == self._deployment.host:
                found.setdefault(address, node["NodeID"])
        return found

    def _start(self, name: str, node: str, index: int) -> Any:
        _LOG.info("%s begins", name)
        options: dict[str, Any] = {
            "name": name,
            "lifetime": "detached",
            "max_concurrency": 2,
            "scheduling_strategy": NodeAffinitySchedulingStrategy(node, soft=False),
        }
        return GatewayActor.options(**options).remote(self._deployment, name, index)  # type: ignore[attr-defined]

    async def _stop(self, name: str) -> None:
        drain = self._deployment.config.gateway.drain_seconds
        try:
            handle = await asyncio.to_thread(ray.get_actor, name)
            await answer(handle.stop.remote(), drain + END_SECONDS, name)
        except (OSError, ValueError, ray.exceptions.RayError) as error:
            _LOG.warning("%s: %s", name, error)
        await self._kill(name)

    async def _kill(self, name: str) -> None:
        self._running.pop(name, None)
        with contextlib.suppress(ValueError):  # it has ended
            kill(await asyncio.to_thread(ray.get_actor, name))


async def _names() -> set[str]:
    """Of all gateways of this namespace."""
    return {name for name in await asyncio.to_thread(ray.util.list_named_actors) if name.startswith(_PREFIX)}
