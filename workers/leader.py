"""The leader's and the followers' loops: plans out, tokens back, one step ahead of the devices."""

from __future__ import annotations

import queue
import time
from collections.abc import Callable

from grok.engine.v1 import engine_pb2
from workers import metrics, wire
from workers.engine.plan import Plan
from workers.engine.request import Refused, TokenEvent
from workers.engine.scheduler import Scheduler
from workers.link import GatewayLink, LeaderServer, Link, LinkError
from workers.runtime.runtime import Pending, Runtime


class Leader:
    """Rank 0's loop. Each turn hears the gateways, plans, broadcasts and dispatches the plan, and only then reads the
    tokens of the plan before, so that devices never wait for Python."""

    def __init__(
        self, runtime: Runtime, scheduler: Scheduler, server: LeaderServer, epoch: int, compilations: Callable[[], int]
    ) -> None:
        self._runtime = runtime
        self._scheduler = scheduler
        self._server = server
        self._epoch = epoch
        self._compilations = compilations
        self._owners: dict[str, GatewayLink] = {}
        self._gateways: set[GatewayLink] = set()
        self._refusals: dict[GatewayLink, list[engine_pb2.Refusal]] = {}

    def run(self) -> None:
        """Serves until a follower is lost, which raises LinkError."""
        pending: Pending | None = None
        clock = _Clock()
        while True:
            # With nothing in flight the head of the queue can always be admitted, so this does not spin.
            idle = pending is None and self._scheduler.load.waiting == 0
            self._hear(block=idle)
            if idle:
                clock.restart()
            plan = self._scheduler.plan()
            clock.lap("plan")
            dispatched = None
            if plan is not None:
                self._server.broadcast(wire.plan_to_proto(plan, self._epoch))
                clock.lap("broadcast")
                dispatched = self._runtime.execute(plan)
                clock.lap("dispatch")
                self._count(plan)
            events: list[TokenEvent] = []
            if pending is not None:
                tokens = self._runtime.read(pending)
                clock.lap("device")
                events = self._scheduler.complete(tokens)
            pending = dispatched
            self._tell(events)
            clock.lap("deliver")
            clock.step()

    def _hear(self, block: bool) -> None:
        """Takes what gateways sent; if there is nothing to compute, waits for it."""
        while True:
            try:
                gateway, message = self._server.inbox.get(block=block)
            except queue.Empty:
                return
            block = False
            if message is None:
                self._drop(gateway)
                continue
            self._gateways.add(gateway)
            if message.HasField("submit"):
                self._submit(gateway, message.submit)
            elif message.HasField("cancel"):
                self._scheduler.cancel(message.cancel.request_id)
                self._owners.pop(message.cancel.request_id, None)

    def _submit(self, gateway: GatewayLink, message: engine_pb2.Submit) -> None:
        try:
            self._scheduler.submit(wire.request_from_proto(message))
            self._owners[message.request_id] = gateway
        except (Refused, ValueError) as error:  # a ValueError is a message that makes no request
            full = isinstance(error, Refused) and error.full
            refusal = engine_pb2.Refusal(request_id=message.request_id, reason=str(error), full=full)
            self._refusals.setdefault(gateway, []).append(refusal)

    def _drop(self, gateway: GatewayLink) -> None:
        """Nobody waits any more for what a lost gateway asked for."""
        self._gateways.discard(gateway)
        self._refusals.pop(gateway, None)
        for request_id in [id for id, owner in self._owners.items() if owner is gateway]:
            self._scheduler.cancel(request_id)
            del self._owners[request_id]

    def _tell(self, events: list[TokenEvent]) -> None:
        """One frame to each gateway: its tokens, its refusals, the load."""
        load = self._scheduler.load
        metrics.RUNNING.set(load.running)
        metrics.WAITING.set(load.waiting)
        metrics.PAGES_USED.set(load.pages_used)
        metrics.PAGES_TOTAL.set(load.pages_total)
        metrics.GENERATED_TOKENS.inc(len(events))
        shared = wire.load_to_proto(load, self._runtime.shape.slots, self._compilations())
        by_gateway: dict[GatewayLink, list[engine_pb2.TokenEvent]] = {}
        for event in events:
            owner = self._owners.get(event.request_id)
            if owner is not None:
                by_gateway.setdefault(owner, []).append(wire.event_to_proto(event))
                if event.finish is not None:
                    del self._owners[event.request_id]
        for gateway in self._gateways:
            gateway.send(
                engine_pb2.LeaderOutput(
                    epoch=self._epoch,
                    tokens=by_gateway.get(gateway, []),
                    refusals=self._refusals.pop(gateway, []),
                    load=shared,
                )
            )

    def _count(self, plan: Plan) -> None:
        metrics.PLANS.inc()
        metrics.PROMPT_TOKENS.inc(sum(len(chunk.tokens) for chunks in plan.prefills for chunk in chunks))


def follow(runtime: Runtime, link: Link, epoch: int) -> None:
    """A follower's loop: carries out plans as they come, at most two ahead of the devices. Returns when the leader ends.

    Raises:
      LinkError: the stream broke, or a plan of another epoch or out of order came.
    """
    pending: Pending | None = None
    expected = 1
    while (frame := link.receive()) is not None:
        message = engine_pb2.Plan.FromString(frame)
        if (message.epoch, message.number) != (epoch, expected):
            raise LinkError(f"plan {message.number} of epoch {message.epoch} came; {expected} of {epoch} is due")
        expected += 1
        dispatched = runtime.execute(wire.plan_from_proto(message))
        metrics.PLANS.inc()
        if pending is not None:
            runtime.wait(pending)
        pending = dispatched


class _Clock:
    """Charges the loop's time to its parts."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        self._began = self._last = time.perf_counter()

    def lap(self, part: str) -> None:
        now = time.perf_counter()
        metrics.HOST_SECONDS.labels(part).inc(now - self._last)
        self._last = now

    def step(self) -> None:
        metrics.STEP_SECONDS.observe(self._last - self._began)
        self._began = self._last
