"""The controller: owns the replicas of a service, and keeps gateways informed. It computes nothing and carries no request."""

from __future__ import annotations

import asyncio
import dataclasses
import os
from collections.abc import AsyncIterator, Sequence
from typing import Protocol

from cluster.config.schema import Config
from cluster.controller.fleet import Fleet
from cluster.controller.integrity import Digests
from cluster.controller.placement import Placements
from cluster.controller.replica import Replica
from cluster.controller.view import GatewayReport, ServiceView

#: A gateway that has not reported for so many seconds is gone.
REPORT_SECONDS = 5.0


class NoReplicaError(LookupError):
    """There is no replica of that number."""


class ControllerClient(Protocol):
    """What gateways ask of the controller."""

    async def sync(self, report: GatewayReport, version: tuple[str, int], seconds: float) -> ServiceView:
        """Reports; the view as soon as its version is not this one, after `seconds` in any case."""

    async def restart(self, replica: int) -> int:
        """Gives a replica new workers; its epoch, when it serves. Raises NoReplicaError, NotReadyError."""

    def profile(self, replica: int, steps: int, seconds: float) -> AsyncIterator[tuple[int, str, bytes]]:
        """Traces; see `Replica.profile`. Raises NoReplicaError too."""


class Controller:
    """The controller itself; see ControllerClient."""

    def __init__(self, config: Config, placements: Placements, digests: Digests, metrics_url: str = "") -> None:
        """`metrics_url`: where its metrics are."""
        self._metrics_url = metrics_url
        self._reports: dict[str, tuple[GatewayReport, float]] = {}
        self._fleet = Fleet(config, placements, digests, self._recent)

    async def run(self) -> None:
        """Keeps replicas alive until cancelled, then ends them."""
        await self._fleet.run()

    async def sync(self, report: GatewayReport, version: tuple[str, int], seconds: float) -> ServiceView:
        self._reports[report.name] = report, asyncio.get_running_loop().time()
        view = await self._fleet.news(version, seconds)
        requests = sum(report.requests for report in self._recent())
        return dataclasses.replace(view, requests=requests, metrics_url=self._metrics_url, pid=os.getpid())

    async def restart(self, replica: int) -> int:
        return await self._named(replica).restart()

    async def profile(self, replica: int, steps: int, seconds: float) -> AsyncIterator[tuple[int, str, bytes]]:
        async for part in self._named(replica).profile(steps, seconds):
            yield part

    def _named(self, index: int) -> Replica:
        replica = next((r for r in self._fleet.replicas if r.index == index), None)
        if replica is None:
            raise NoReplicaError(f"there is no replica {index}")
        return replica

    def _recent(self) -> Sequence[GatewayReport]:
        oldest = asyncio.get_running_loop().time() - REPORT_SECONDS
        self._reports = {name: told for name, told in self._reports.items() if told[1] >= oldest}
        return [report for report, _ in self._reports.values()]
