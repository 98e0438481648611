"""The leader's loop: plans out, tokens back, one step ahead of the devices."""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import faulthandler
import logging
import queue
import time
from collections.abc import Callable, Generator, Iterator
from typing import Any, TypeVar

from workers.engine.prefill_budget import PrefillBudget
from workers.engine.scheduler import Counts, Scheduler
from workers.host.follower import probe
from workers.host.plan_log import PlanLog
from workers.host.streams import GatewayLink, Incoming, LeaderServer, LinkError
from workers.host.watchdog import Watchdog
from workers.messages.frames import LayerGroup, LeaderOutput, Refusal, RefusalKind, Status
from workers.messages.plan import ALTERNATIVES, Plan, Sampling, StepTokens
from workers.messages.request import Ahead, Failure, Refused, Request, ScoreEvent, Timing, TokenEvent, belongs
from workers.model.config import GrokConfig
from workers.runtime.profiler import Profiler
from workers.runtime.runtime import Pending, Runtime
from workers.telemetry import metrics
from workers.telemetry.stalls import StallWatch
from workers.text.grammar_job import Constraints, RemoteConstraint

_LOG = logging.getLogger(__name__)

#: So often an idle mesh computes a token.
CANARY_SECONDS = 5.0
CANARY = Request("canary", (0,), 1, Sampling(top_logprobs=ALTERNATIVES))
#: Requests whose grammars may be under way to be followed.
MAX_OPENING = 512
#: Seconds that a turn of the loop listens to gateways while there is something to compute.
HEAR_SECONDS = 0.005
#: Gateways get a status so often.
STATUS_SECONDS = 1.0
#: Seconds that news of a trial may take to be on their way.
FLUSH_SECONDS = 0.5
#: Seconds that the loop waits for what tokens may come next, while the devices are busy anyway.
SETTLE_SECONDS = 0.002


_Event = TypeVar("_Event", TokenEvent, ScoreEvent)


class Nothing(enum.Enum):
    """That nothing has come."""

    NOTHING = 0


NOTHING = Nothing.NOTHING


@dataclasses.dataclass(frozen=True)
class InboxWait:
    """The loop waits so many seconds for what gateways send; is sent that, or NOTHING."""

    seconds: float


@dataclasses.dataclass(frozen=True)
class StepWait:
    """The loop waits for a step, and is sent its tokens."""

    pending: Pending


class Leader:
    """Rank 0's loop. Each turn reads what gateways sent, plans, broadcasts and dispatches the plan, and only then reads the
    tokens of the plan before, so that devices never wait for Python."""

    def __init__(
        self,
        runtime: Runtime,
        scheduler: Scheduler,
        server: LeaderServer,
        epoch: int,
        compilations: Callable[[], int],
        profiler: Profiler,
        constraints: Constraints,
        stalls: StallWatch,
        prefill_slowdown: float,
        plan_log: PlanLog | None = None,
    ) -> None:
        self._runtime = runtime
        self._scheduler = scheduler
        self._server = server
        self._epoch = epoch
        self._compilations = compilations
        self._profiler = profiler
        self._constraints = constraints
        self._stalls = stalls
        self._plan_log = plan_log
        self._opening: dict[str, tuple[Request, RemoteConstraint]] = {}
        self._budget = PrefillBudget(runtime.shape.chunk, prefill_slowdown)
        self._counted = Counts()
        self._waits: dict[str, _Wait] = {}
        self._slots: dict[int, str] = {}
        self._routing = Routing(runtime.config)
        metrics.SLOTS.set(runtime.shape.slots)
        self._owners: dict[str, GatewayLink] = {}
        # In the order in which they came.
        self._gateways: dict[GatewayLink, None] = {}
        self._greeted: set[GatewayLink] = set()
        #: Of the first canary.
        self._canary: tuple[float, ...] = ()
        self._refusals: dict[GatewayLink, list[Refusal]] = {}
        self._trying = ""
        self._status_due = 0.0
        self.watchdog = Watchdog(self._give_up, self._working, time.monotonic, excused=server.late)

    def run(self) -> None:
        """Serves until a follower is lost, which raises LinkError; gateways only once all hosts have computed a token."""
        self.watchdog.start()
        turns = self.turns()
        wait = next(turns)
        while True:
            if isinstance(wait, StepWait):
                wait = turns.send(self._runtime.read(wait.pending))
            else:
                wait = turns.send(self._next(wait.seconds))

    def turns(self) -> Generator[InboxWait | StepWait, Any, None]:
        """The loop without its waiting: yields what it waits for, and is sent what has come of it."""
        yield from self._prove()
        pending: Pending | None = None
        clock = _Clock()
        prefill_budget = self._runtime.shape.chunk
        idle, seconds = True, 0.0
        while True:
            self._stalls.turn()
            yield from self._hear(block=idle)
            if idle:
                clock.restart()
                seconds = 0.0
            self._submit_opened()
            plan = self._scheduler.plan(prefill_budget)
            clock.lap("plan")
            dispatched = None
            self._announce_trial()
            if plan is not None:
                self._broadcast(plan)
                clock.lap("broadcast")
                self._profiler.step()
                self._count(plan)
                dispatched = self._execute(plan)
                clock.lap("dispatch")
            events: list[TokenEvent] = []
            finished = pending.plan if pending is not None else None
            if pending is not None:
                with self._waiting(pending.plan):
                    tokens = yield StepWait(pending)
                events = self._complete(pending.plan, tokens)
                clock.lap("device")
                if dispatched is not None:
                    self._constraints.settle(SETTLE_SECONDS)
            # Then only what gateways send, or a mask, can change anything.
            idle = pending is None and dispatched is None
            if idle and self._stalls.watching:
                self._scheduler.check_integrity()
            pending = dispatched
            if pending is not None:
                with self._waiting(pending.plan):
                    probe(self._runtime, pending)
            self._fail(self._scheduler.failures())
            self._tell(events, self._scheduler.scores())
            clock.lap("deliver")
            seconds += clock.step()
            if finished is not None:
                self._scheduler.speculation.after(finished, seconds)
                prefill_budget, seconds = self._budget.after(finished, seconds), 0.0
            metrics.PREFILL_BUDGET.set(prefill_budget)

    def _prove(self) -> Generator[StepWait, StepTokens, None]:
        self._scheduler.submit(CANARY)
        while (plan := self._scheduler.plan()) is not None:
            self._broadcast(plan)
            self._count(plan)
            pending = self._execute(plan)
            with self._waiting(plan):
                tokens = yield StepWait(pending)
            self._canary += tuple(
                logprob for token in tokens.prefilled for logprob in (token.logprob, *dict(token.top).values())
            )
            self._complete(plan, tokens)
        self._fail(self._scheduler.failures())

    def _give_up(self, reason: str) -> None:
        faulthandler.dump_traceback(all_threads=True)  # what hangs, as far as this rank knows
        self._server.give_up(reason)

    def _working(self) -> bool:
        """Whether a rank is at work, as far as that shows: accelerators may compute or hang while their hosts do anything."""
        activity = self._server.activity
        activity.note(0, time.process_time())
        return self._runtime.host_computes and activity.working()

    def _announce_trial(self) -> None:
        """Before the devices get a request that may break this process, all get to know."""
        if self._trying != self._scheduler.trying:
            self._trying = self._scheduler.trying
            for gateway in self._gateways:
                gateway.send(LeaderOutput(self._epoch, trying=self._trying))
            until = time.monotonic() + FLUSH_SECONDS
            for gateway in self._gateways:
                gateway.flush(until)

    def _broadcast(self, plan: Plan) -> None:
        if self._plan_log is not None:
            self._plan_log.plan(plan)
        self._server.broadcast(plan)

    def _execute(self, plan: Plan) -> Pending:
        self.watchdog.dispatched(plan)
        with self._waiting(plan):
            return self._runtime.execute(plan)

    @contextlib.contextmanager
    def _waiting(self, plan: Plan) -> Iterator[None]:
        """The devices have to do with a plan while the block runs."""
        with self.watchdog.waiting(plan), self._stalls.resting():
            yield

    def _complete(self, plan: Plan, tokens: StepTokens) -> list[TokenEvent]:
        self.watchdog.done(plan)
        if self._plan_log is not None:
            self._plan_log.tokens(tokens)
        self._routing.add(tokens.expert_tokens)
        return [event for event in self._scheduler.complete(tokens) if event.request_id != CANARY.id]

    def _hear(self, block: bool) -> Generator[InboxWait, Incoming | Nothing | None, None]:
        """Takes what gateways sent. If there is nothing to compute it waits, and computes the canary's token if nothing comes,
        so that a broken mesh is found before a request needs it. Raises LinkError when the mesh is broken."""
        until = time.monotonic() + (CANARY_SECONDS if block else 0.0) + HEAR_SECONDS
        while time.monotonic() < until:
            incoming = yield InboxWait(CANARY_SECONDS if block else 0.0)
            if incoming is NOTHING:
                if block:
                    with contextlib.suppress(Refused):  # the last one waits for a slot still
                        self._scheduler.submit(CANARY)
                return
            if incoming is None:
                raise self._server.broken
            if block:
                block, until = False, time.monotonic() + HEAR_SECONDS
            gateway, message = incoming
            if gateway is None:  # a mask has come
                continue
            if message is None:
                self._drop(gateway)
                continue
            self._gateways[gateway] = None
            if message.submit is not None:
                self._submit(gateway, message.submit)
            elif message.cancel:
                self._cancel(message.cancel)
            elif message.abort:
                self._abort(message.abort)

    def _next(self, seconds: float) -> Incoming | Nothing | None:
        try:
            if not seconds:
                return self._server.inbox.get_nowait()
            with self._stalls.resting():
                return self._server.inbox.get(timeout=seconds)
        except queue.Empty:
            return NOTHING

    def _submit(self, gateway: GatewayLink, request: Request) -> None:
        try:
            owner = self._owners.get(request.id)
            if owner is gateway:
                raise Refused(f"request id {request.id} is in use")
            if owner is not None:  # it comes over another stream now, and the end of the first one is not known yet
                self._cancel(request.id)
            if request.grammar:
                if len(self._opening) >= MAX_OPENING:
                    raise Refused(f"{len(self._opening)} requests with formats are waiting already", full=True)
                self._opening[request.id] = request, self._constraints.open(request)
            else:
                self._scheduler.submit(request)
            self._owners[request.id] = gateway
            forced = 0 if self._runtime.shape.batch_invariant else len(request.resumed)
            self._waits[request.id] = _Wait(time.monotonic(), forced)
        except Refused as error:
            self._refuse(gateway, request.id, error)

    def _submit_opened(self) -> None:
        """Queues the requests whose grammars can be followed now."""
        for request_id, (request, constraint) in list(self._opening.items()):
            if not constraint.ready:
                continue
            del self._opening[request_id]
            try:
                if constraint.problem and not constraint.passing:
                    self._fail([Failure(request_id, f"its format can't be followed: {constraint.problem}")])
                    continue
                if constraint.problem:
                    raise Refused(constraint.problem, full=True)
                self._scheduler.submit(request, constraint)
            except Refused as error:
                constraint.close()
                self._refuse(self._owners[request_id], request_id, error)
                self._forget(request_id)

    def _refuse(self, gateway: GatewayLink, request_id: str, error: Refused) -> None:
        kind = RefusalKind.FULL if error.full else RefusalKind.INVALID
        self._refusals.setdefault(gateway, []).append(Refusal(request_id, str(error), kind))

    def _fail(self, failures: list[Failure]) -> None:
        """Ends requests that can't go on. Raises LinkError if nothing that the mesh computes is of use."""
        for failure in failures:
            if failure.request_id == CANARY.id:
                raise LinkError(f"the mesh computes nothing of use: {failure.reason}")
            refusal = Refusal(failure.request_id, failure.reason, RefusalKind.FAILED)
            self._refusals.setdefault(self._owners[failure.request_id], []).append(refusal)
            self._forget(failure.request_id)

    def _drop(self, gateway: GatewayLink) -> None:
        """Cancels what a lost gateway asked for."""
        self._gateways.pop(gateway, None)
        self._greeted.discard(gateway)
        self._refusals.pop(gateway, None)
        for request_id in [id for id, owner in self._owners.items() if owner is gateway]:
            self._cancel(request_id)

    def _cancel(self, request_id: str) -> None:
        if (opening := self._opening.pop(request_id, None)) is not None:
            opening[1].close()
        self._scheduler.cancel(request_id)
        self._forget(request_id)

    def _abort(self, call: str) -> None:
        """Cancels a call's requests, and has their gateway know."""
        for request_id, gateway in [(id, owner) for id, owner in self._owners.items() if belongs(id, call)]:
            self._cancel(request_id)
            refusal = Refusal(request_id, "it was cancelled", RefusalKind.FAILED, cancelled=True)
            self._refusals.setdefault(gateway, []).append(refusal)

    def _forget(self, request_id: str) -> None:
        self._owners.pop(request_id, None)
        self._waits.pop(request_id, None)

    def _timed(self, event: _Event) -> _Event:
        """Observes what a request waited for, at its first token or its last score."""
        wait = self._waits.pop(event.request_id, None)
        if wait is None:
            return event
        timing = Timing(wait.admitted - wait.arrived, time.monotonic() - wait.admitted, wait.computed)
        return dataclasses.replace(event, timing=timing)

    def _tell(self, events: list[TokenEvent], scores: list[ScoreEvent]) -> None:
        """One frame to each gateway: its scores and tokens, its refusals, the load."""
        load = self._scheduler.load
        metrics.RUNNING.set(load.running)
        metrics.WAITING.set(load.waiting)
        metrics.PAGES_USED.set(load.pages_used)
        metrics.PAGES_TOTAL.set(load.pages_total)
        metrics.PAGES_CACHED.set(load.pages_cached)
        metrics.GENERATED_TOKENS.inc(len(events))
        load = dataclasses.replace(load, waiting=load.waiting + len(self._opening))
        metrics.SCORED_TOKENS.inc(sum(len(event.scores) for event in scores))
        scores_of: dict[GatewayLink, list[ScoreEvent]] = {}
        for scored in scores:
            owner = self._owners.get(scored.request_id)
            if owner is not None:
                scores_of.setdefault(owner, []).append(self._timed(scored) if scored.done else scored)
                if scored.done:
                    self._forget(scored.request_id)
        by_gateway: dict[GatewayLink, list[TokenEvent]] = {}
        for event in events:
            owner = self._owners.get(event.request_id)
            if owner is not None:
                by_gateway.setdefault(owner, []).append(self._timed(event))
                if event.finish is not None:
                    self._forget(event.request_id)
        now, status, ahead = time.monotonic(), None, dict[str, Ahead]()
        if now >= self._status_due or self._gateways.keys() - self._greeted:
            self._status_due = now + STATUS_SECONDS
            status = Status(self._compilations(), self._routing.layer_groups)
            ahead = dict(self._scheduler.ahead()) if len(self._gateways) > 1 else {}
        for gateway in self._gateways:
            gateway.send(
                LeaderOutput(
                    self._epoch,
                    tokens=tuple(by_gateway.get(gateway, ())),
                    refusals=tuple(self._refusals.pop(gateway, ())),
                    load=load,
                    status=status and dataclasses.replace(status, others=self._others(ahead, gateway)),
                    canary=() if gateway in self._greeted else self._canary,
                    scores=tuple(scores_of.get(gateway, ())),
                )
            )
        self._greeted |= self._gateways.keys()

    def _others(self, ahead: dict[str, Ahead], gateway: GatewayLink) -> tuple[Ahead, ...]:
        """Requests of other gateways than this one."""
        return tuple(one for name, one in ahead.items() if self._owners.get(name) not in (None, gateway))

    def _count(self, plan: Plan) -> None:
        metrics.PLANS.inc()
        metrics.PROMPT_TOKENS.inc(plan.prompt_tokens)
        counts, before = self._scheduler.counts, self._counted
        metrics.PREFIX_TOKENS.labels("hit").inc(counts.prompt_tokens_cached - before.prompt_tokens_cached)
        metrics.PREFIX_TOKENS.labels("miss").inc(counts.prompt_tokens_computed - before.prompt_tokens_computed)
        metrics.DRAFT_TOKENS.labels("right").inc(counts.guesses_right - before.guesses_right)
        metrics.DRAFT_TOKENS.labels("wrong").inc(counts.guesses_wrong - before.guesses_wrong)
        metrics.PREEMPTIONS.inc(counts.preemptions - before.preemptions)
        self._counted = dataclasses.replace(counts)
        metrics.ASSIGNMENTS.inc((plan.prompt_tokens + plan.decode_rows) * self._routing.assignments_per_token)
        if plan.decode or plan.drafts:
            metrics.BATCH.observe(len(plan.decode) + len(plan.drafts))
        now = time.monotonic()
        for start in plan.starts:
            wait = self._waits.get(start.request_id)
            self._slots[start.slot] = start.request_id
            if wait is not None:
                wait.admitted, wait.computed = now, wait.forced
                metrics.QUEUE_SECONDS.observe(now - wait.arrived)
        for chunk in (chunk for call in plan.prefills for chunk in call):
            if (wait := self._waits.get(self._slots[chunk.slot])) is not None:
                wait.computed += len(chunk.tokens)


class Routing:
    """Counts the tokens of each expert by groups of layers, for Prometheus and for the gateways."""

    def __init__(self, config: GrokConfig) -> None:
        self.assignments_per_token = config.num_layers * config.num_selected_experts
        self._groups = config.layer_groups()
        self._counts = [[0] * config.num_experts for _ in self._groups]
        self._counters = [
            [metrics.EXPERT_TOKENS.labels(_span(g), str(expert)) for expert in range(config.num_experts)]
            for g in config.layer_groups()
        ]

    def add(self, expert_tokens: tuple[tuple[int, ...], ...]) -> None:
        """Adds a step's counts, [groups, E]."""
        for sums, counters, counts in zip(self._counts, self._counters, expert_tokens, strict=True):
            for expert, count in enumerate(counts):
                sums[expert] += count
                counters[expert].inc(count)

    @property
    def layer_groups(self) -> tuple[LayerGroup, ...]:
        return tuple(
            LayerGroup(group.start, group.stop - 1, tuple(sums))
            for group, sums in zip(self._groups, self._counts, strict=True)
        )


def _span(layers: range) -> str:
    return str(layers.start) if len(layers) == 1 else f"{layers.start}-{layers.stop - 1}"


@dataclasses.dataclass
class _Wait:
    """A request without tokens: its times, positions that were decoded for it though their tokens were known, and all positions
    that were computed."""

    arrived: float
    forced: int
    admitted: float = 0.0
    computed: int = 0


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

    def step(self) -> float:
        """Ends a step; its seconds."""
        seconds = self._last - self._began
        metrics.STEP_SECONDS.observe(seconds)
        self._began = self._last
        return seconds
