"""The service: a controller that Ray starts again when it dies, and gateways. All of it is the project's own code."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

from opentelemetry import trace

from cluster.config.schema import Config
from cluster.controller.client import GRACE_SECONDS
from cluster.controller.controller import Controller
from cluster.controller.integrity import Digests
from cluster.controller.ray_calls import answer
from cluster.controller.view import GatewayReport, ServiceView
from cluster.gateway.admission.admission import Admission
from cluster.gateway.admission.latency import RecentLatency
from cluster.gateway.auth.api_keys import Caller
from cluster.gateway.call import CURRENT, Call
from cluster.gateway.controller_watch import ControllerWatch
from cluster.gateway.routing.router import Router
from cluster.gateway.service import GenerationService
from cluster.gateway.validation import Limits
from grok.serving.v1 import generation_pb2
from tests.simulation.placements import Cluster, SimPlacements
from tests.simulation.workers import CONTEXT
from tests.simulation.world import DeadError, SimNetwork, SimProcess, World, call
from tests.support.fake_service import MODEL, InlineTexts


class Controllers:
    """The controller, life after life; a `ControllerClient` of each gateway comes from `client`."""

    def __init__(self, cluster: Cluster, configs: Sequence[Config]) -> None:
        self._cluster, self._configs, self._world = cluster, configs, cluster.world
        self.process: SimProcess
        self.controller: Controller
        self.start()

    def start(self) -> None:
        process = self.process = SimProcess(self._world.front)
        placements = SimPlacements(self._cluster, process)
        self.controller = Controller(
            self._configs, placements, Digests({}), network=SimNetwork(process), place=ServiceView(pid=process.pid)
        )
        self._life = process.spawn(self.controller.run())

    def kill(self) -> None:
        self.process.die()
        self._world.loop.call_later(self._world.rng.uniform(0.5, 3), self.start)

    async def end(self) -> None:
        """Ends all replicas, as an orderly end does."""
        await self.controller.settled()
        self._life.cancel()

    def client(self, process: SimProcess) -> SimControllerClient:
        return SimControllerClient(self, process)


class SimControllerClient:
    """How a gateway's process asks whichever controller there is."""

    def __init__(self, controllers: Controllers, process: SimProcess) -> None:
        self._controllers, self._process = controllers, process

    async def sync(self, report: GatewayReport, version: tuple[str, int], seconds: float) -> ServiceView:
        there, controller = self._controllers.process, self._controllers.controller
        asked = call(self._process, there, controller.sync, (report, version, seconds))
        try:
            view: ServiceView = await answer(asked, seconds + GRACE_SECONDS, "the controller")
        except DeadError as error:
            raise OSError(str(error)) from error
        return view

    async def restart(self, replica: int) -> int:
        there, controller = self._controllers.process, self._controllers.controller
        epoch: int = await call(self._process, there, controller.restart, (replica,))
        return epoch

    async def profile(self, replica: int, steps: int, seconds: float) -> AsyncIterator[tuple[int, str, bytes]]:
        async for part in self._controllers.controller.profile(replica, steps, seconds):
            yield part


class SimGateway:
    """A gateway's process."""

    def __init__(self, world: World, controllers: Controllers, config: Config, name: str) -> None:
        assert config.gateway.failover_seconds is not None
        self.process = SimProcess(world.front)
        self.name = name
        self.router = Router(
            config.gateway.failover_seconds,
            silence=config.cluster.silence_seconds,
            numbers=config.model.numbers,
            network=SimNetwork(self.process),
        )
        self.admission = Admission(config.gateway.max_requests, clock=time.monotonic)
        self._latency = RecentLatency(time.monotonic)
        limits = Limits(MODEL, CONTEXT, 16)
        model = generation_pb2.GetModelResponse(name="demo")
        texts = InlineTexts()
        self._service = GenerationService(
            limits, texts, self.router, self.admission, self._latency, model, trace.NoOpTracer(), log_prompts=False
        )
        self._watch = ControllerWatch(controllers.client(self.process), self._report, self._follow)
        self.process.spawn(self._watch.run())

    def die(self) -> None:
        self.process.die()
        asyncio.ensure_future(self.router.close())  # noqa: RUF006  # what was done for it ends with it

    def begin(self, request: generation_pb2.GenerateRequest, caller: Caller) -> SimCall:
        return SimCall(self, self._service, request, caller)

    def cancel(self, request_id: str) -> None:
        """Ends a request, whichever gateway's it is."""
        self.router.abort(request_id)

    def _follow(self, view: ServiceView, report: GatewayReport) -> None:
        self.router.follow(view)
        self.admission.learn(report.keys, view.keys)

    def _report(self) -> GatewayReport:
        return GatewayReport(
            name=self.name,
            pid=self.process.pid,
            listening=True,
            requests=self.admission.in_flight,
            unplaced=self.router.unplaced,
            time_to_first_token=self._latency.quantile(0.9),
            keys=self.admission.uses(),
        )


class SimCall:
    """A client's stream from a gateway: parts, and None when it has ended well. Raises the gateway's errors, or GoneError."""

    def __init__(
        self, gateway: SimGateway, service: GenerationService, request: generation_pb2.GenerateRequest, caller: Caller
    ) -> None:
        self._parts: asyncio.Queue[Any] = asyncio.Queue(1)
        self._gateway, self._service, self._request, self._caller = gateway, service, request, caller
        self._task = gateway.process.spawn(self._serve())

    async def next(self) -> generation_pb2.GenerateResponse | None:
        part = asyncio.ensure_future(self._parts.get())
        died = asyncio.ensure_future(self._gateway.process.dead.wait())
        try:
            await asyncio.wait((part, died), return_when=asyncio.FIRST_COMPLETED)
            if not part.done():
                raise GoneError
            found = part.result()
        finally:
            part.cancel()
            died.cancel()
        if isinstance(found, Exception):
            raise found
        answered: generation_pb2.GenerateResponse | None = found
        return answered

    def leave(self) -> None:
        self._task.cancel()

    async def _serve(self) -> None:
        made = Call("Generate")
        made.caller = self._caller
        CURRENT.set(made)
        context: Any = _Context()
        try:
            stream: Any = self._service.Generate(self._request, context)
            async with contextlib.aclosing(stream) as parts:
                async for part in parts:
                    await self._parts.put(part)
            await self._parts.put(None)
        except Exception as error:
            await self._parts.put(error)


class GoneError(Exception):
    """A client's gateway has died."""


class _Context:
    def time_remaining(self) -> float | None:
        return None
