"""How the controller of this Ray namespace is reached. It may have moved since it was last asked."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import ray
import ray.exceptions

from cluster.controller.ray_calls import answer
from cluster.controller.view import GatewayReport, ServiceView
from cluster.deployment import Deployment

NAME = "controller"
#: Seconds that it may take to start, and that ending the service may take beyond draining.
START_SECONDS, END_SECONDS = 60.0, 60.0
#: Seconds beyond its own that a call may take before the controller is taken to be away.
GRACE_SECONDS = 2.0


class RayController:
    """A ControllerClient. Raises OSError and RayError when the controller does not answer."""

    def __init__(self) -> None:
        self._actor: Any = None

    async def start(self) -> Deployment:
        """Waits until it works; what it serves."""
        deployment: Deployment = await self._ask("start", START_SECONDS)
        return deployment

    async def end(self) -> dict[str, tuple[int, float]]:
        """Drains gateways, ends all replicas and then the controller; the budgets of keys, see `Ledger.budgets`."""
        budgets: dict[str, tuple[int, float]] = {}
        with contextlib.suppress(OSError, ray.exceptions.RayError):
            drain = (await self.start()).config.gateway.drain_seconds
            budgets = await self._ask("end", drain + END_SECONDS)
        await self.kill()
        return budgets

    async def kill(self) -> None:
        """Ends the controller for good, but nothing else, and waits until its name is free."""
        with contextlib.suppress(ValueError):
            while True:
                ray.kill(await asyncio.to_thread(ray.get_actor, NAME))
                await asyncio.sleep(0.05)
        self._actor = None

    async def inherit(self, budgets: dict[str, tuple[int, float]], seconds: float) -> None:
        """See `Ledger.inherit`."""
        await self._ask("inherit", GRACE_SECONDS, budgets, seconds)

    async def sync(self, report: GatewayReport, version: tuple[str, int], seconds: float) -> ServiceView:
        view: ServiceView = await self._ask("sync", seconds + GRACE_SECONDS, report, version, seconds)
        return view

    async def view(self) -> ServiceView:
        """The service as it is now, for one that is no gateway."""
        view: ServiceView = await self._ask("view", GRACE_SECONDS)
        return view

    async def restart(self, replica: int) -> int:
        epoch: int = await (await self._found()).restart.remote(replica)
        return epoch

    async def profile(self, replica: int, steps: int, seconds: float) -> AsyncIterator[tuple[int, str, bytes]]:
        actor = await self._found()
        async for part in actor.profile.options(num_returns="streaming").remote(replica, steps, seconds):
            yield await part

    async def _ask(self, method: str, seconds: float, *arguments: Any) -> Any:
        actor = await self._found()
        try:
            return await answer(getattr(actor, method).remote(*arguments), seconds, "the controller")
        except ray.exceptions.RayActorError:
            self._actor = None
            raise

    async def _found(self) -> Any:
        """Its handle. Raises OSError."""
        if self._actor is None:
            try:
                self._actor = await asyncio.to_thread(ray.get_actor, NAME)
            except ValueError as error:
                raise OSError("there is no controller") from error
        return self._actor
