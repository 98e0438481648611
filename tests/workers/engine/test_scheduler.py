"""The scheduler under random histories: nothing leaks, nobody starves, nothing belongs to two."""

from __future__ import annotations

import collections
import dataclasses
import itertools
import math
import os

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from workers.engine.scheduler import MAX_PASSED_OVER, Scheduler
from workers.messages.plan import MAX_VERIFIED, DecodeRow, Draft, EngineShape, Plan, Sampling, StepTokens, Token
from workers.messages.request import TRIAL_TOKENS, Finish, Refused, Request, TokenEvent

EOS = 2
VOCAB = 100
SHAPE = EngineShape(slots=4, groups=2, pages=9, page_size=4, chunk=6, context=40)
EXACT = dataclasses.replace(SHAPE, batch_invariant=True)
MAX_WAITING = 6
#: Of the random histories; `make operations` tries many more.
OPERATIONS = int(os.environ.get("GROKMESH_OPERATIONS", "14400"))


def _request(id: str, prompt: int, max_tokens: int) -> Request:
    return Request(id, tuple(range(3, 3 + prompt)), max_tokens, Sampling(), frozenset({EOS}))


def _answer(plan: Plan, tokens: list[int]) -> StepTokens:
    """Tokens for a plan, taken from `tokens`."""
    source = iter(tokens)
    last = [chunk for chunks in plan.prefills for chunk in chunks if chunk.last]
    return StepTokens(
        plan.number,
        tuple(Token(next(source), 0.0, ()) for _ in last),
        tuple(tuple(Token(next(source), 0.0, ()) for _ in range(plan.steps)) for _ in plan.decode),
        tuple(_verified(draft, Token(next(source), 0.0, ())) for draft in plan.drafts),
    )


def _computed(plan: Plan) -> set[int]:
    """The slots for which a plan computes anything."""
    chunks = {chunk.slot for chunks in plan.prefills for chunk in chunks}
    return {*chunks, *(row.slot for row in plan.decode), *(draft.slot for draft in plan.drafts)}


def _verified(draft: Draft, token: Token) -> tuple[Token, ...]:
    """As if guesses below `token` were right."""
    right = list(itertools.takewhile(lambda guess: guess < token.id, draft.tokens[1:]))
    return (*(Token(guess, 0.0, ()) for guess in right), token)


class _Mesh:
    """What hosts know: who owns a slot, how far it is. Checks each plan as a careful host would."""

    def __init__(self, shape: EngineShape) -> None:
        self.shape = shape
        self.pages: dict[int, tuple[int, ...]] = {}
        self.position: dict[int, int] = {}
        self.prompt_done: dict[int, bool] = {}
        self.guessed: dict[int, int] = {}

    def execute(self, plan: Plan) -> None:
        for grant in plan.grants:
            assert grant.first == len(self.pages[grant.slot])
            self.pages[grant.slot] += grant.pages
        for start in plan.starts:
            self.pages[start.slot] = start.pages
            self.position[start.slot] = -1  # where its first chunk starts
            self.prompt_done[start.slot] = False
            self.guessed.pop(start.slot, None)
        for chunks in plan.prefills:
            groups = [SHAPE.group_of(chunk.slot) for chunk in chunks]
            assert len(set(groups)) == len(groups), "two chunks of a group in one call"
            for chunk in chunks:
                if not self.shape.batch_invariant:
                    assert chunk.start % SHAPE.chunk == 0, "a chunk starts at a multiple of the chunk size"
                if self.position[chunk.slot] == -1:
                    assert chunk.start % SHAPE.page_size == 0, "full pages are shared"
                    self.position[chunk.slot] = chunk.start
                assert self.position[chunk.slot] == chunk.start
                assert not self.prompt_done[chunk.slot]
                assert 0 < len(chunk.tokens) <= SHAPE.chunk
                self._advance(chunk.slot, len(chunk.tokens))
                self.prompt_done[chunk.slot] = chunk.last
        written = [*(row.slot for row in plan.decode), *(draft.slot for draft in plan.drafts)]
        assert len(set(written)) == len(written)
        assert not plan.drafts or len(written) <= MAX_VERIFIED
        for row in plan.decode:
            assert self.prompt_done[row.slot]
            assert self.position[row.slot] <= row.position <= self.position[row.slot] + self.guessed.pop(row.slot, 0)
            self.position[row.slot] = row.position
            self._advance(row.slot, plan.steps)
        for draft in plan.drafts:
            assert self.prompt_done[draft.slot]
            assert (
                self.position[draft.slot]
                <= draft.position
                <= self.position[draft.slot] + self.guessed.get(draft.slot, 0)
            )
            # The known token is written for certain, guesses if they are right.
            self.position[draft.slot] = draft.position + 1
            self.guessed[draft.slot] = len(draft.tokens) - 1
            assert draft.position + len(draft.tokens) <= len(self.pages[draft.slot]) * SHAPE.page_size

    def _advance(self, slot: int, count: int) -> None:
        self.position[slot] += count
        assert self.position[slot] <= len(self.pages[slot]) * SHAPE.page_size, "a write beyond the slot's pages"


class SchedulerMachine(RuleBasedStateMachine):
    """Requests, cancellations, plans and tokens in any order, with up to two plans in flight."""

    shape, steps = SHAPE, 1

    def __init__(self) -> None:
        super().__init__()
        self.scheduler = Scheduler(self.shape, VOCAB, MAX_WAITING, self.steps)
        self.mesh = _Mesh(self.shape)
        self.in_flight: collections.deque[Plan] = collections.deque()
        self.requests: dict[str, Request] = {}
        self.received: collections.Counter[str] = collections.Counter()
        self.started: list[str] = []
        self.count = 0
        self.prefill_budget: int | None = None

    @rule(prompt=st.integers(0, 30), max_tokens=st.integers(0, 20), trial=st.integers(0, 5))
    def submit(self, prompt: int, max_tokens: int, trial: int) -> None:
        self.count += 1
        request = dataclasses.replace(_request(f"r{self.count}", prompt, max_tokens), trial=trial == 0)
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
        plan = self.scheduler.plan(self.prefill_budget)
        if plan is not None:
            self.mesh.execute(plan)
            self.in_flight.append(plan)
            if self.scheduler.trying:
                computed = set().union(*map(_computed, self.in_flight))
                assert len(computed) == 1, "one that is on trial is computed alone"

    @precondition(lambda self: self.in_flight)
    @rule(data=st.data())
    def complete(self, data: st.DataObject) -> None:
        most = (1 + self.steps) * SHAPE.slots
        tokens = st.lists(st.sampled_from([EOS, 5, 6, 7, 8, 9]), min_size=most, max_size=most)
        self._receive(self.scheduler.complete(_answer(self.in_flight.popleft(), data.draw(tokens))))

    def _receive(self, events: list[TokenEvent]) -> None:
        for event in events:
            request = self.requests[event.request_id]  # nothing comes for one that has ended
            self.received[request.id] += 1
            count = self.received[request.id]
            if event.token.id == EOS:
                assert event.finish is Finish.EOS
            else:
                assert (event.finish is Finish.LENGTH) == (count == request.max_tokens)
            if event.finish is not None:
                del self.requests[request.id]

    @invariant()
    def every_page_belongs_to_one_or_is_a_shared_prefix(self) -> None:
        load = self.scheduler.load
        assert load.running + load.waiting == len(self.requests)
        assert load.waiting <= MAX_WAITING + SHAPE.slots, "a preempted one waits besides"
        self.scheduler.check_integrity()

    def teardown(self) -> None:
        """Everything that was taken ends within a bounded number of steps, and leaves nothing behind."""
        for _ in range(2000):
            if self.in_flight:
                self._receive(self.scheduler.complete(_answer(self.in_flight.popleft(), [5] * 40)))
            plan = self.scheduler.plan()
            if plan is not None:
                self.mesh.execute(plan)
                self.in_flight.append(plan)
            elif not self.in_flight:
                break
        assert not self.requests, "a request starved"
        assert self.scheduler.load.running == self.scheduler.load.pages_used == 0
        self.scheduler.check_integrity()


class ExactSchedulerMachine(SchedulerMachine):
    """Prompts cut anywhere, completions shared, guesses, several steps a plan."""

    shape, steps = EXACT, 3

    @rule(budget=st.integers(1, SHAPE.chunk))
    def set_budget(self, budget: int) -> None:
        self.prefill_budget = budget


class FarSchedulerMachine(ExactSchedulerMachine):
    """More steps a plan than a draft has tokens."""

    steps = 5


TestScheduler = SchedulerMachine.TestCase
TestFarScheduler = FarSchedulerMachine.TestCase
TestExactScheduler = ExactSchedulerMachine.TestCase
TestScheduler.settings = TestExactScheduler.settings = TestFarScheduler.settings = settings(
    max_examples=OPERATIONS // 180, stateful_step_count=60, deadline=None
)


def _completed(scheduler: Scheduler, request: Request) -> list[Plan]:
    """The plans that a request takes alone; every token is 5."""
    scheduler.submit(request)
    plans = []
    while (plan := scheduler.plan()) is not None:
        plans.append(plan)
        scheduler.complete(_answer(plan, [5] * 40))
    return plans


def test_a_prompt_that_was_computed_before_is_not_computed_again() -> None:
    scheduler = Scheduler(EXACT, VOCAB, MAX_WAITING)
    first, second = (_completed(scheduler, _request(name, 13, 2)) for name in ("first", "second"))
    assert sum(plan.prompt_tokens for plan in first) == 13
    assert sum(plan.prompt_tokens for plan in second) == 1  # three full pages of four are shared
    assert scheduler.counts.prompt_tokens_cached == 12


def test_a_completion_is_shared_with_the_prompt_that_quotes_it() -> None:
    scheduler = Scheduler(EXACT, VOCAB, MAX_WAITING)
    first = _request("first", 6, 8)
    _completed(scheduler, first)
    again = dataclasses.replace(first, id="again", prompt=(*first.prompt, *[5] * 7))
    assert sum(plan.prompt_tokens for plan in _completed(scheduler, again)) == 1  # of 13


def test_where_bits_depend_on_the_cut_a_prefix_is_shared_up_to_a_cut() -> None:
    scheduler = Scheduler(SHAPE, VOCAB, MAX_WAITING)
    _completed(scheduler, _request("first", 20, 2))
    second = _completed(scheduler, _request("second", 20, 2))
    assert sum(plan.prompt_tokens for plan in second) == 8  # 12 is a multiple of the page of 4 and the chunk of 6


def test_prompts_that_begin_alike_and_come_together_are_computed_once() -> None:
    scheduler = Scheduler(EXACT, VOCAB, MAX_WAITING)
    for i in range(2):
        scheduler.submit(_request(f"r{i}", 9, 4))
    computed, running = 0, []
    while (plan := scheduler.plan()) is not None:
        computed += plan.prompt_tokens
        running.append(scheduler.load.running)
        scheduler.complete(_answer(plan, [5] * 40))
    assert computed == 9 + 1
    assert max(running) == 2


def test_the_longest_unused_prefix_makes_room() -> None:
    scheduler = Scheduler(EXACT, VOCAB, MAX_WAITING)
    for start in (3, 33, 63):  # six pages each: two groups of eight pages can't keep three
        request = Request(f"r{start}", tuple(range(start, start + 23)), 2, Sampling(), frozenset({EOS}))
        _completed(scheduler, request)
    load = scheduler.load
    assert load.pages_used == 0
    assert load.pages_cached <= load.pages_total
    newest = Request("newest", tuple(range(63, 86)), 2, Sampling(), frozenset({EOS}))
    assert sum(plan.prompt_tokens for plan in _completed(scheduler, newest)) == 3


def test_a_higher_priority_goes_first_among_those_that_wait() -> None:
    scheduler = Scheduler(SHAPE, VOCAB, MAX_WAITING)
    for i in range(5):
        scheduler.submit(dataclasses.replace(_request(f"r{i}", 2, 3), priority=int(i == 4)))
    plan = scheduler.plan()
    assert plan is not None
    assert [start.request_id for start in plan.starts] == ["r4", "r0", "r1", "r2"]


def test_who_has_fewer_slots_goes_first() -> None:
    scheduler = Scheduler(SHAPE, VOCAB, MAX_WAITING)
    for i, owner in enumerate("aaaaab"):
        scheduler.submit(dataclasses.replace(_request(f"{owner}{i}", 2, 3), owner=owner))
    plan = scheduler.plan()
    assert plan is not None
    assert [start.request_id for start in plan.starts] == ["a0", "b5", "a1", "a2"]


def test_a_sequence_that_repeats_itself_is_guessed_and_gets_several_tokens_a_step() -> None:
    scheduler = Scheduler(EXACT, VOCAB, MAX_WAITING)
    prompt = (7, 8, 9, 10) * 4
    scheduler.submit(Request("again", prompt, 16, Sampling(), frozenset()))
    expected = itertools.cycle(prompt)
    got, steps = [], 0
    while (plan := scheduler.plan()) is not None:
        steps += 1
        drafted = tuple(tuple(Token(next(expected), 0.0, ()) for _ in draft.tokens) for draft in plan.drafts)
        drawn = [*plan.decode, *(chunk for call in plan.prefills for chunk in call if chunk.last)]
        answer = _answer(dataclasses.replace(plan, drafts=()), [next(expected) for _ in drawn])
        got += [event.token.id for event in scheduler.complete(dataclasses.replace(answer, drafted=drafted))]
    assert tuple(got) == prompt
    assert scheduler.counts.guesses_right >= 3
    assert scheduler.counts.guesses_wrong == 0
    assert steps < 16


def test_nothing_is_guessed_beside_more_sequences_than_a_program_takes() -> None:
    """Not even in the plan that computes the newcomer's prompt and its second token at once."""
    scheduler = Scheduler(dataclasses.replace(EXACT, slots=8, pages=200, context=100), VOCAB, MAX_WAITING)
    prompt = (7, 8, 9, 10) * 4
    for i in range(MAX_VERIFIED):
        scheduler.submit(Request(f"again{i}", prompt, 40, Sampling(), frozenset()))
    places = dict[int, int]()
    guessed = 0
    for step in range(60):
        if step == 15:  # when all are guessed
            scheduler.submit(Request("new", (1, 2, 3), 40, Sampling(), frozenset()))
        plan = scheduler.plan()
        if plan is None:
            break
        guessed += len(plan.drafts)
        assert not plan.drafts or len(plan.decode) + len(plan.drafts) <= MAX_VERIFIED
        scheduler.complete(_continued(plan, prompt, places))
    assert guessed > MAX_VERIFIED


def _continued(plan: Plan, cycle: tuple[int, ...], places: dict[int, int]) -> StepTokens:
    """Each slot goes on in the cycle; all guesses are right."""

    def following(slot: int, count: int) -> tuple[Token, ...]:
        first = places.get(slot, 0)
        places[slot] = first + count
        return tuple(Token(cycle[place % len(cycle)], 0.0, ()) for place in range(first, first + count))

    last = [chunk for call in plan.prefills for chunk in call if chunk.last]
    return StepTokens(
        plan.number,
        tuple(token for chunk in last for token in following(chunk.slot, 1)),
        tuple(following(row.slot, plan.steps) for row in plan.decode),
        tuple(following(draft.slot, len(draft.tokens)) for draft in plan.drafts),
    )


def test_a_sequence_that_surprises_is_not_guessed() -> None:
    scheduler = Scheduler(EXACT, VOCAB, MAX_WAITING)
    scheduler.submit(Request("new", (3, 4, 5) * 3, 20, Sampling(), frozenset()))
    tokens = iter(range(10, 100))
    while (plan := scheduler.plan()) is not None:
        assert not plan.drafts
        scheduler.complete(_answer(plan, [next(tokens), next(tokens)]))


def test_several_steps_are_planned_at_once_only_while_nobody_waits() -> None:
    scheduler = Scheduler(EXACT, VOCAB, MAX_WAITING, steps=4)
    for i in range(4):
        scheduler.submit(_request(f"r{i}", 1 + i, 9))
    steps = []
    for _ in range(4):
        plan = scheduler.plan()
        assert plan is not None
        steps.append((bool(plan.prefills), plan.steps))
    assert steps == [
        (True, 1),
        (True, 1),
        (False, 4),
        (False, 2),
    ]  # nine tokens: 2 beside prompts, 4, and one has 2 left
    scheduler.submit(_request("waits", 3, 9))
    last = scheduler.plan()
    assert last is not None
    assert last.steps == 1


class _AllowOnly:
    """Allows one token after the other."""

    ready, problem = True, ""

    def __init__(self, tokens: list[int]) -> None:
        self.tokens = tokens

    def mask(self) -> bytes:
        return (1 << self.tokens[0]).to_bytes(16, "little")

    def accept(self, token: int) -> None:
        assert token == self.tokens.pop(0)

    def close(self) -> None:
        assert not self.tokens


def test_a_grammar_gives_each_token_its_own_mask_and_holds_up_nobody_else() -> None:
    scheduler = Scheduler(SHAPE, VOCAB, MAX_WAITING)
    scheduler.submit(_request("free", 2, 20))
    scheduler.submit(_request("bound", 3, 20), _AllowOnly([11, 12, EOS]))
    masked = []
    pending: Plan | None = None
    while (plan := scheduler.plan()) is not None or pending is not None:
        if plan is not None:
            slots = {mask.slot: mask for mask in plan.masks}
            masked += [int.from_bytes(mask.words, "little").bit_length() - 1 for mask in plan.masks]
        if pending is not None:  # one plan ahead, as the leader is
            allowed = {m.slot: int.from_bytes(m.words, "little").bit_length() - 1 for m in pending.masks}
            tokens = [allowed.get(c.slot, 5) for call in pending.prefills for c in call if c.last]
            scheduler.complete(_answer(pending, tokens + [allowed.get(row.slot, 5) for row in pending.decode]))
        pending = plan
    assert masked == [11, 12, EOS]
    assert slots == {}


def _allowed(plan: Plan) -> list[int]:
    """The lowest token that each mask of a plan allows, and the number of those that it allows."""
    masks = [int.from_bytes(mask.words, "little") for mask in plan.masks]
    return [n for mask in masks for n in ((mask & -mask).bit_length() - 1, mask.bit_count())]


@pytest.mark.parametrize("resumed", [(), (5,)])
@pytest.mark.parametrize("shape", [SHAPE, EXACT])
def test_no_completion_ends_before_it_may(shape: EngineShape, resumed: tuple[int, ...]) -> None:
    scheduler = Scheduler(shape, VOCAB, MAX_WAITING, steps=4)
    ending = frozenset({0, EOS})
    request = Request("r", (3, 4), 9, Sampling(masked=True), ending, min_tokens=3, resumed=resumed)
    scheduler.submit(request)
    masks, sampled = [], len(resumed) if shape.batch_invariant else 0
    while (plan := scheduler.plan()) is not None:
        if plan.masks:
            masks.append((sampled, _allowed(plan)))
        sampled += plan.steps * len(plan.decode) + sum(chunk.last for call in plan.prefills for chunk in call)
        scheduler.complete(_answer(plan, [7] * 16))
    start = 1 if resumed else 0
    assert masks == [(start, [1, VOCAB - 2]), (3, [0, VOCAB])], "each mask stays until another comes"


def test_who_can_best_wait_is_preempted_for_want_of_pages() -> None:
    scheduler = Scheduler(dataclasses.replace(SHAPE, slots=3, groups=1), VOCAB, MAX_WAITING)
    for i in range(3):
        request = dataclasses.replace(_request(f"r{i}", 4, 28), priority=int(i == 1))
        scheduler.submit(request)  # eight pages each in the end; there are eight
    ended: list[str] = []
    received: collections.Counter[str] = collections.Counter()
    while (plan := scheduler.plan()) is not None:
        for event in scheduler.complete(_answer(plan, [5] * 9)):
            received[event.request_id] += 1
            ended += [event.request_id] if event.finish else []
    assert ended == ["r1", "r0", "r2"], "by priority, then by age"
    assert set(received.values()) == {28}, "no token twice"
    assert scheduler.counts.preemptions > 0


def test_who_comes_first_is_served_first() -> None:
    scheduler = Scheduler(SHAPE, VOCAB, MAX_WAITING)
    for i in range(4):
        scheduler.submit(Request(f"small{i}", tuple(range(3 + 20 * i, 8 + 20 * i)), 8, Sampling(), frozenset({EOS})))
    scheduler.plan()
    scheduler.submit(_request("large", 20, 12))  # waits for pages
    scheduler.submit(_request("late", 1, 1))  # would fit, but must not overtake
    plan = scheduler.plan()
    assert plan is not None
    assert not plan.starts
    assert scheduler.load.waiting == 2


def test_a_long_prompt_delays_decoding_by_one_chunk_a_step() -> None:
    scheduler = Scheduler(SHAPE, VOCAB, MAX_WAITING)
    scheduler.submit(_request("short", 3, 20))
    first = scheduler.plan()
    assert first is not None
    assert first.decode == (DecodeRow(0, 3),)
    scheduler.submit(_request("long", 18, 4))
    for _ in range(3):
        plan = scheduler.plan()
        assert plan is not None
        assert len(plan.prefills) == 1
        assert 0 in [row.slot for row in plan.decode]


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


def _broken(plan: Plan) -> StepTokens:
    """What comes of a plan where the model gives no numbers."""
    answer = _answer(plan, [7] * 64)
    nothing = Token(7, math.nan, ())
    return dataclasses.replace(answer, prefilled=(nothing,) * len(answer.prefilled))


def test_a_request_for_which_the_model_gives_no_numbers_fails_and_what_it_computed_is_shared_with_nobody() -> None:
    scheduler = Scheduler(dataclasses.replace(EXACT, chunk=16), VOCAB, MAX_WAITING)
    scheduler.submit(_request("broken", 12, 5))
    plan = scheduler.plan()
    assert plan is not None
    assert scheduler.complete(_broken(plan)) == []
    (failure,) = scheduler.failures()
    assert (failure.request_id, failure.reason) == ("broken", "the model gave no numbers")
    assert scheduler.failures() == []
    assert scheduler.load.pages_used == 0
    scheduler.submit(_request("again", 12, 5))
    scheduler.plan()
    assert scheduler.counts.prompt_tokens_cached == 0


class _Slow:
    """A constraint whose masks come when they are let."""

    def __init__(self) -> None:
        self.ready, self.problem, self.closed = True, "", False

    def mask(self) -> bytes:
        assert self.ready
        return b"\xff" * 16

    def accept(self, token: int) -> None:
        del token
        self.ready = False

    def close(self) -> None:
        self.closed = True


def test_a_request_whose_mask_is_not_known_yet_waits_and_nobody_else_does() -> None:
    scheduler, slow = Scheduler(EXACT, VOCAB, MAX_WAITING), _Slow()
    scheduler.submit(_request("slow", 2, 5), slow)
    scheduler.submit(_request("free", 2, 30))
    first = scheduler.plan()
    assert first is not None
    (slot,) = (start.slot for start in first.starts if start.request_id == "slow")
    scheduler.complete(_answer(first, [7] * 4))
    for _ in range(3):
        plan = scheduler.plan()
        assert plan is not None
        assert slot not in [row.slot for row in plan.decode]
        scheduler.complete(_answer(plan, [7] * 4))
    slow.ready = True
    plan = scheduler.plan()
    assert plan is not None
    assert slot in [row.slot for row in plan.decode]
    scheduler.complete(_answer(plan, [7] * 4))
    slow.ready, slow.problem = True, "it leads nowhere"
    scheduler.plan()
    (failure,) = scheduler.failures()
    assert failure.request_id == "slow"
    assert "it leads nowhere" in failure.reason
    assert slow.closed


def test_a_flood_of_requests_that_will_share_a_prompt_is_not_looked_through_with_each_plan(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    looked = []
    will_be_shared = Scheduler._will_be_shared

    def counted(self: Scheduler, prefix: tuple[int, ...], cached: int, salt: str) -> bool:
        looked.append(prefix)
        return will_be_shared(self, prefix, cached, salt)

    monkeypatch.setattr(Scheduler, "_will_be_shared", counted)
    scheduler = Scheduler(dataclasses.replace(EXACT, slots=8, pages=99), VOCAB, 5000)
    for i in range(5000):
        scheduler.submit(_request(f"r{i}", 30, 2))
    for _ in range(3):
        looked.clear()
        plan = scheduler.plan()
        assert plan is not None
        assert len(looked) <= MAX_PASSED_OVER + 8
        scheduler.complete(_answer(plan, [7] * 16))


def test_of_equal_claims_the_oldest_goes_first_whoever_owns_it() -> None:
    scheduler = Scheduler(dataclasses.replace(SHAPE, slots=2), VOCAB, 10)
    for i, owner in enumerate("baab"):
        scheduler.submit(dataclasses.replace(_request(f"r{i}", 2 + i, 3), owner=owner))
    plan = scheduler.plan()
    assert plan is not None
    assert [start.request_id for start in plan.starts] == ["r0", "r1"]


def test_one_on_trial_is_computed_alone_until_some_tokens_have_come() -> None:
    scheduler = Scheduler(EXACT, VOCAB, MAX_WAITING)
    for i in range(2):
        scheduler.submit(_request(f"before{i}", 3 + i, 20))
    early = scheduler.plan()
    assert early is not None
    suspect = Request("suspect", tuple(range(50, 59)), 15, Sampling(), resumed=(7, 8), trial=True)
    scheduler.submit(suspect)
    assert scheduler.plan() is None, "the tokens of others are due still"
    scheduler.complete(_answer(early, [5] * 9))
    alone = 0
    while (plan := scheduler.plan()) is not None and scheduler.trying:
        assert scheduler.trying == "suspect"
        assert len(_computed(plan)) == 1
        alone += len(scheduler.complete(_answer(plan, [9 + alone] * 9)))
    assert alone == TRIAL_TOKENS
    assert plan is not None
    assert len(_computed(plan)) == 3


class _Flickering(_Slow):
    """A constraint whose mask comes in the middle of a plan's making."""

    def __init__(self) -> None:
        super().__init__()
        self._asked = 0

    @property
    def ready(self) -> bool:
        self._asked += 1
        return self._asked % 2 == 0

    @ready.setter
    def ready(self, value: bool) -> None:
        del value

    def mask(self) -> bytes:
        return b"\xff" * 16


def test_a_mask_that_comes_while_a_plan_is_made_lets_nobody_decode_without_a_page() -> None:
    scheduler = Scheduler(dataclasses.replace(EXACT, groups=1), VOCAB, MAX_WAITING)
    scheduler.submit(_request("r", 3, 30), _Flickering())
    pages: dict[int, int] = {}
    position = 0
    for _ in range(200):
        plan = scheduler.plan()
        if plan is None:
            continue
        for start in plan.starts:
            pages[start.slot] = len(start.pages)
        for grant in plan.grants:
            pages[grant.slot] += len(grant.pages)
        for slot, position in plan.decode:
            assert position < pages[slot] * SHAPE.page_size, "there is a page for what it writes"
        scheduler.complete(_answer(plan, [7] * 8))
    assert position > 20


def test_requests_of_different_salts_share_no_pages() -> None:
    scheduler = Scheduler(dataclasses.replace(EXACT, slots=8, pages=99), VOCAB, 10)

    def computed(name: str, salt: str) -> int:
        before = scheduler.counts.prompt_tokens_computed
        scheduler.submit(dataclasses.replace(_request(name, 30, 2), salt=salt))
        while (plan := scheduler.plan()) is not None:
            scheduler.complete(_answer(plan, [7] * 16))
        return scheduler.counts.prompt_tokens_computed - before

    assert [computed("a", "x"), computed("b", "y")] == [30, 30]
    assert computed("c", "x") < 30
    for name, salt in (("d", "x"), ("e", "z"), ("f", "z")):  # of two that come together, the second waits for the first
        scheduler.submit(dataclasses.replace(_request(name, 30, 2), salt=salt))
    plan = scheduler.plan()
    assert plan is not None
    assert len(plan.starts) == 2
