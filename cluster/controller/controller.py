"""The controller: owns the replicas of a service, and keeps gateways informed. It computes nothing and carries no request."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Protocol

from cluster.config.schema import Config
from cluster.controller.fleet import Fleet
from cluster.controller.integrity import Digests
from cluster.controller.ledger import KeyState, Ledger
from cluster.controller.placement import Placements
from cluster.controller.replica import Replica
from cluster.controller.view import GatewayReport, ServiceView
from cluster.network import REAL, Network

#: A gateway that has not reported for so many seconds is gone.
REPORT_SECONDS = 5.0


_NOWHERE = ServiceView()


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

    def __init__(
        self,
        configs: Sequence[Config],
        placements: Placements,
        digests: Digests,
        place: ServiceView = _NOWHERE,
        network: Network = REAL,
    ) -> None:
        """`configs` are the service's, and those of fewer hosts for when some are lost; `place` is a view that has where the
        controller itself is."""
        self._place = place
        self._reports: dict[str, tuple[GatewayReport, float]] = {}
        self._ledger = Ledger()
        self._fleet = Fleet(configs, placements, digests, lambda: self.reports, network)

    async def run(self) -> None:
        """Keeps replicas alive until cancelled, then ends them."""
        await self._fleet.run()

    async def settled(self) -> None:
        """Returns once it is known what another controller has left: only then can all of it be ended."""
        await self._fleet.adopted.wait()

    async def sync(self, report: GatewayReport, version: tuple[str, int], seconds: float) -> ServiceView:
        now = time.monotonic()
        before = self._reports.get(report.name)
        if before is not None and before[0].pid != report.pid:  # it has died, and was started again
            self._ledger.forget(before[0].life)
        self._reports[report.name] = report, now
        keys = self._ledger.report(report.life, report.keys, now)
        return self._whole(await self._fleet.news(version, seconds), keys)

    async def view(self) -> ServiceView:
        """The service as it is now."""
        await self.settled()
        return self._whole(self._fleet.view(), {})

    def _whole(self, fleet: ServiceView, keys: Mapping[str, KeyState]) -> ServiceView:
        """A view of the replicas, with what else there is."""
        reports = self.reports
        return dataclasses.replace(
            self._place,
            replicas=fleet.replicas,
            wanted=fleet.wanted,
            version=fleet.version,
            requests=sum(report.requests for report in reports),
            gateways=tuple(reports),
            keys=keys,
        )

    def inherit(self, budgets: Mapping[str, tuple[int, float]], seconds: float) -> None:
        """See `Ledger.inherit`."""
        self._ledger.inherit(budgets, seconds, time.monotonic())

    def budgets(self) -> dict[str, tuple[int, float]]:
        """See `Ledger.budgets`."""
        return self._ledger.budgets(time.monotonic())

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

    @property
    def reports(self) -> list[GatewayReport]:
        """Of all gateways that have reported lately."""
        oldest = time.monotonic() - REPORT_SECONDS
        for report in [report for report, at in self._reports.values() if at < oldest]:
            del self._reports[report.name]
            self._ledger.forget(report.life)
        return [report for report, _ in self._reports.values()]
