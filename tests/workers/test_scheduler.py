"""The scheduler under random histories: nothing leaks, nobody starves, nothing belongs to two."""

from __future__ import annotations

import collections

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from workers.engine.plan import EngineShape, Plan, Sampling, StepTokens, Token
from workers.engine.request import Finish, Refused, Request, TokenEvent
from workers.engine.scheduler import Scheduler

EOS = 2
VOCAB = 100
SHAPE = EngineShape(slots=4, groups=2, pages=9, page_size=4, chunk=6, context=40)
MAX_WAITING = 6


def _request(id: str, prompt: int, max_tokens: int) -> Request:
    return Request(id, tuple(range(3, 3 + prompt)), max_tokens, Sampling(), frozenset({EOS}))


def _answer(plan: Plan, tokens: list[int]) -> StepTokens:
    """Tokens for a plan, taken from `tokens`."""
    source = iter(tokens)
    last = [chunk for chunks in plan.prefills for chunk in chunks if chunk.last]
    return StepTokens(
        plan.number,
        tuple(Token(next(source), 0.0, ()) for _ in last),
        tuple(Token(next(source), 0.0, ()) for _ in plan.decode),
    )


class _Mesh:
    """What hosts know: who owns a slot, how far it is. Checks each plan as a careful host would."""

    def __init__(self) -> None:
        self.pages: dict[int, tuple[int, ...]] = {}
        self.position: dict[int, int] = {}
        self.prompt_done: dict[int, bool] = {}

    def execute(self, plan: Plan) -> None:
        for admission in plan.admissions:
            self.pages[admission.slot] = admission.pages
            self.position[admission.slot] = 0
            self.prompt_done[admission.slot] = False
        for chunks in plan.prefills:
            groups = [SHAPE.group_of(chunk.slot) for chunk in chunks]
            assert len(set(groups)) == len(groups), "two chunks of a group in one call"
            for chunk in chunks:
                assert chunk.start % SHAPE.chunk == 0, "a chunk starts at a multiple of the chunk size"
                assert self.position[chunk.slot] == chunk.start
                assert not self.prompt_done[chunk.slot]
                assert 0 < len(chunk.tokens) <= SHAPE.chunk
                self._advance(chunk.slot, len(chunk.tokens))
                self.prompt_done[chunk.slot] = chunk.last
        assert len(set(plan.decode)) == len(plan.decode)
        for slot in plan.decode:
            assert self.prompt_done[slot]
            self._advance(slot, 1)

    def _advance(self, slot: int, count: int) -> None:
        self.position[slot] += count
        assert self.position[slot] <= len(self.pages[slot]) * SHAPE.page_size, "a write beyond the slot's pages"


class SchedulerMachine(RuleBasedStateMachine):
    """Requests, cancellations, plans and tokens in any order, with up to two plans in flight."""

    def __init__(self) -> None:
        super().__init__()
        self.scheduler = Scheduler(SHAPE, VOCAB, MAX_WAITING)
        self.mesh = _Mesh()
        self.in_flight: collections.deque[Plan] = collections.deque()
        self.requests: dict[str, Request] = {}
        self.received: collections.Counter[str] = collections.Counter()
        self.started: list[str] = []
        self.count = 0

    @rule(prompt=st.integers(0, 30), max_tokens=st.integers(0, 20))
    def submit(self, prompt: int, max_tokens: int) -> None:
        self.count += 1
        request = _request(f"r{self.count}", prompt, max_tokens)
        fits = prompt > 0 and max_tokens > 0 and prompt + max_tokens <= SHAPE.context
        fits = fits and SHAPE.pages_for(prompt + max_tokens - 1) <= SHAPE.pages - 1
        refusal = None
        try:
            self.scheduler.submit(request)
            self.requests[request.id] = request
        except Refused as refused:
            refusal = refused
        assert (refusal is None or refusal.full) == fits

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        id = data.draw(st.sampled_from(sorted(self.requests)))
        assert self.scheduler.cancel(id)
        assert not self.scheduler.cancel(id)
        del self.requests[id]

    @precondition(lambda self: len(self.in_flight) < 2)
    @rule()
    def plan(self) -> None:
        plan = self.scheduler.plan()
        if plan is not None:
            self.mesh.execute(plan)
            self.in_flight.append(plan)

    @precondition(lambda self: self.in_flight)
    @rule(data=st.data())
    def complete(self, data: st.DataObject) -> None:
        tokens = st.lists(st.sampled_from([EOS, 5, 6, 7, 8, 9]), min_size=2 * SHAPE.slots, max_size=2 * SHAPE.slots)
        self._receive(self.scheduler.complete(_answer(self.in_flight.popleft(), data.draw(tokens))))

    def _receive(self, events: list[TokenEvent]) -> None:
        for event in events:
            request = self.requests[event.request_id]  # nothing comes for one that has ended
            self.received[request.id] += 1
            count = self.received[request.id]
            if event.token.id == EOS:
                assert event.finish is Finish.STOP
            else:
                assert (event.finish is Finish.LENGTH) == (count == request.max_tokens)
            if event.finish is not None:
                del self.requests[request.id]

    @invariant()
    def every_page_belongs_to_one(self) -> None:
        load = self.scheduler.load
        assert load.running + load.waiting == len(self.requests)
        assert load.waiting <= MAX_WAITING
        running = self.scheduler._running.values()
        owned: collections.Counter[tuple[int, int]] = collections.Counter()
        for sequence in running:
            group = SHAPE.group_of(sequence.slot)
            owned.update((group, page) for page in self.scheduler._pools[group]._owned[sequence.request.id])
        assert all(count == 1 for count in owned.values())
        assert all(page != 0 for _, page in owned)
        assert len(owned) == load.pages_used
        assert load.pages_used + sum(pool.free for pool in self.scheduler._pools) == load.pages_total
        assert len({sequence.slot for sequence in running}) == load.running

    def teardown(self) -> None:
        """Everything that was taken ends within a bounded number of steps, and leaves nothing behind."""
        for _ in range(2000):
            if self.in_flight:
                self._receive(self.scheduler.complete(_answer(self.in_flight.popleft(), [5] * 20)))
            plan = self.scheduler.plan()
            if plan is not None:
                self.mesh.execute(plan)
                self.in_flight.append(plan)
            elif not self.in_flight:
                break
        assert not self.requests, "a request starved"
        assert self.scheduler.load.pages_used == 0
        assert len(self.scheduler._free_slots) == SHAPE.slots


TestScheduler = SchedulerMachine.TestCase
TestScheduler.settings = settings(max_examples=150, stateful_step_count=60, deadline=None)


def test_who_comes_first_is_served_first() -> None:
    scheduler = Scheduler(SHAPE, VOCAB, MAX_WAITING)
    for i in range(4):
        scheduler.submit(_request(f"small{i}", 5, 8))
    scheduler.plan()
    scheduler.submit(_request("large", 20, 12))  # waits for pages
    scheduler.submit(_request("late", 1, 1))  # would fit, but must not overtake
    plan = scheduler.plan()
    assert plan is not None
    assert not plan.admissions
    assert scheduler.load.waiting == 2


def test_a_long_prompt_delays_decoding_by_one_chunk_a_step() -> None:
    scheduler = Scheduler(SHAPE, VOCAB, MAX_WAITING)
    scheduler.submit(_request("short", 3, 20))
    first = scheduler.plan()
    assert first is not None
    assert first.decode == (0,)
    scheduler.submit(_request("long", 18, 4))
    for _ in range(3):
        plan = scheduler.plan()
        assert plan is not None
        assert len(plan.prefills) == 1
        assert 0 in plan.decode


@pytest.mark.parametrize(
    ("request_", "reason"),
    [
        (_request("a", 0, 5), "the prompt is empty"),
        (_request("a", 30, 11), "30 prompt tokens and max_tokens=11 exceed the context of 40"),
        (_request("a", 30, 10), "needs 10 pages; the cache has 8"),
        (_request("a", 1, 0), "max_tokens=0 must be at least 1"),
        (Request("a", (VOCAB,), 1, Sampling()), "outside the vocabulary of 100"),
        (Request("a", (1,), 1, Sampling(allowed_tokens=(VOCAB,))), "outside the vocabulary of 100"),
    ],
)
def test_what_can_not_be_served_is_refused_with_a_reason(request_: Request, reason: str) -> None:
    with pytest.raises(Refused, match=reason) as refused:
        Scheduler(SHAPE, VOCAB, MAX_WAITING).submit(request_)
    assert not refused.value.full
