"""Continuous batching: which sequences run, which prompt positions are computed next, which sequences decode."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterator

from workers.engine.acceptance import check_request, pages_of
from workers.engine.drafter import NgramDrafter
from workers.engine.pages import PageGroups
from workers.engine.policy import policy_for
from workers.engine.queue import Waiting, WaitingQueue
from workers.engine.sequence import NoNumbersError, Sequence
from workers.engine.speculation import CONVINCING, LEAST, Speculation
from workers.messages.plan import (
    MAX_DRAFT,
    MAX_VERIFIED,
    Chunk,
    Draft,
    EngineShape,
    Forced,
    PageGrant,
    Plan,
    Score,
    SlotStart,
    StepTokens,
    Token,
)
from workers.messages.request import (
    TRIAL_TOKENS,
    Ahead,
    Constraint,
    Failure,
    Load,
    Refused,
    Request,
    ScoreEvent,
    TokenEvent,
)

#: Waiting requests that a plan passes over, as their prompts will be shared, before it looks at no more.
MAX_PASSED_OVER = 16

NO_NUMBERS = "the model gave no numbers"


@dataclasses.dataclass(frozen=True)
class _InFlight:
    """The sequences that get the tokens, or scores, of a plan."""

    number: int
    scored: list[Sequence]
    prefilled: list[Sequence]
    decoded: list[Sequence]
    drafted: list[tuple[Sequence, Draft]]


@dataclasses.dataclass
class Counts:
    """What the scheduler has done since it was made."""

    prompt_tokens_cached: int = 0
    prompt_tokens_computed: int = 0
    guesses_right: int = 0
    guesses_wrong: int = 0
    preemptions: int = 0


class Scheduler:
    """Turns requests into plans and sampled tokens into events. Single-threaded; knows nothing of devices.

    Requests get slots in the order of `WaitingQueue`. One is also overtaken while a prompt that begins like its own is being
    computed, whose pages it will share.

    A sequence gets pages as it grows. When none are left, the one that was admitted last, of the lowest priority, is preempted:
    it waits again, before all others, and is resumed later. The oldest of the highest priority never is, and all pages together
    hold any request, so that one ends, and then the next.

    A plan may be made before the tokens of the one before are known. A sequence that turns out to have ended meanwhile is
    computed once more, for nothing; its slot and pages may be given away at once, because hosts carry plans out in order.
    Sequences with a grammar or a draft wait for their tokens.

    A request that is resumed goes on as if it had never ended; how, is the policy's.

    One that is on trial is planned alone, from the moment when no other one's tokens are due.
    """

    def __init__(self, shape: EngineShape, vocab_size: int, max_waiting: int, steps: int = 1) -> None:
        """At most `max_waiting` requests wait; a plan decodes up to `steps` tokens for each sequence."""
        self._shape = shape
        self._vocab_size = vocab_size
        self._max_waiting = max_waiting
        self._steps = steps
        self._policy = policy_for(shape)
        self._pages = PageGroups(shape)
        self._waiting = WaitingQueue()
        self._running: dict[str, Sequence] = {}
        self._in_flight: collections.deque[_InFlight] = collections.deque()
        self._next_number = 1
        # The requests whose next tokens are guessed. They stay the same while a plan is made: a sequence that waits for its
        # tokens is given no pages.
        self._guessed: frozenset[str] = frozenset()
        self.speculation = Speculation()
        self._failures: list[Failure] = []
        self._scores: list[ScoreEvent] = []
        self._trial: Sequence | None = None
        self.counts = Counts()

    @property
    def load(self) -> Load:
        """How busy the engine is now."""
        pages = self._pages
        return Load(
            slots=self._shape.slots,
            running=len(self._running),
            waiting=len(self._waiting),
            pages_used=pages.used,
            pages_total=pages.total,
            pages_cached=pages.cached,
            positions=pages.total * self._shape.page_size,
        )

    @property
    def trying(self) -> str:
        """The request that is on trial and computed alone; empty if there is none."""
        return self._trial.request.id if self._trial is not None else ""

    def ahead(self) -> Iterator[tuple[str, Ahead]]:
        """All requests, by id, as those behind them see them."""
        for sequence in self._running.values():
            request = sequence.request
            yield request.id, Ahead.of(request, request.max_tokens - len(request.resumed) - sequence.left)
        for entry in self._waiting:
            yield entry.request.id, Ahead.of(entry.request)

    def submit(self, request: Request, constraint: Constraint | None = None) -> None:
        """Queues a request, with what its grammar allows after `request.resumed` if it has one.

        Raises:
          Refused: it can never be served (too long, or not well formed), or the queue is full.
        """
        if request.id in self._waiting or request.id in self._running:
            raise Refused(f"request id {request.id} is in use")
        check_request(request, self._shape, self._vocab_size)
        if len(self._waiting) >= self._max_waiting:
            raise Refused(f"{len(self._waiting)} requests are waiting already", full=True)
        self._waiting.append(Waiting(request, constraint, len(request.resumed)))

    def cancel(self, request_id: str) -> bool:
        """Ends a request without further events; its slot and pages are free for the next plan. False if unknown."""
        if (waiting := self._waiting.remove(request_id)) is not None:
            if waiting.constraint is not None:
                waiting.constraint.close()
            return True
        sequence = self._running.get(request_id)
        if sequence is None:
            return False
        self._end(sequence)
        return True

    def failures(self) -> list[Failure]:
        """The requests that have failed since this was last asked: they are forgotten, and get no further events."""
        failures, self._failures = self._failures, []
        return failures

    def plan(self, prefill_budget: int | None = None) -> Plan | None:
        """The next step, or None when there is nothing to compute before tokens come back. While others decode it computes
        at most `prefill_budget` prompt positions, a chunk if that is None, so that a long prompt delays them by that much at
        most."""
        self._look_at_constraints()
        if self._in_flight and self._trial_can_begin():
            return None
        self._guessed = self._worth_guessing()
        grants = self._grow()
        starts = self._admit()
        computed = self._computed()
        others_decode = any(sequence.prompt_done for sequence in computed)
        calls = list(self._prefill(prefill_budget if others_decode and prefill_budget else self._shape.chunk))
        last = [sequence for call in calls for sequence, chunk in call if chunk.last]
        scored = [sequence for call in calls for sequence, chunk in call if chunk.scored]
        ready = [s for s in computed if s.prompt_done and s.left > 0 and not self._awaited(s)]
        ready = [s for s in ready if not (s.forced and s in last)]  # a plan has one mask, or forced token, for a slot
        ready.sort(key=lambda sequence: sequence.slot)
        drafts = list(self._draft(ready)) if len(ready) <= MAX_VERIFIED else []
        decoding = [sequence for sequence in ready if not sequence.drafting]
        if not calls and not decoding and not drafts:
            assert not grants, "what grows decodes"
            assert not starts, "what is admitted is computed"
            return None
        steps = self._steps_ahead(decoding) if not calls and not drafts and not self._waiting else 1
        places = [(s, s.scheduled - 1) for s in last] + [(s, s.scheduled) for s in decoding]
        forced = ((s.slot, s.force_at(place)) for s, place in places)
        masks = (s.mask_at(place) for s, place in places)
        plan = Plan(
            number=self._next_number,
            starts=starts,
            masks=tuple(mask for mask in masks if mask is not None),
            prefills=tuple(tuple(chunk for _, chunk in call) for call in calls),
            forced=tuple(Forced(slot, token) for slot, token in forced if token is not None),
            decode=tuple(sequence.decode(steps) for sequence in decoding),
            drafts=tuple(draft for _, draft in drafts),
            steps=steps,
            grants=grants,
        )
        self._in_flight.append(_InFlight(plan.number, scored, last, decoding, drafts))
        self._next_number += 1
        self.counts.prompt_tokens_computed += plan.prompt_tokens
        return plan

    def scores(self) -> list[ScoreEvent]:
        """What has become of scored tokens since this was last asked; it comes before the tokens of the same plans."""
        scores, self._scores = self._scores, []
        return scores

    def complete(self, tokens: StepTokens) -> list[TokenEvent]:
        """Takes the tokens of the oldest plan whose tokens are due; returns what its requests get.

        Raises:
          ValueError: the tokens are not that plan's.
        """
        due = self._in_flight.popleft()
        if due.number != tokens.number:
            raise ValueError(f"tokens of plan {tokens.number} came; those of {due.number} are due")
        events: list[TokenEvent] = []
        for sequence, scores in zip(due.scored, tokens.scored, strict=True):
            self._receive_scores(sequence, scores)
        for sequence, token in zip(due.prefilled, tokens.prefilled, strict=True):
            events += self._receive(sequence, (token,))
        for sequence, decoded in zip(due.decoded, tokens.decoded, strict=True):
            events += self._receive(sequence, decoded)
        for (sequence, draft), drafted in zip(due.drafted, tokens.drafted, strict=True):
            sequence.scheduled += len(drafted)
            sequence.drafting = False
            self.counts.guesses_right += len(drafted) - 1
            self.counts.guesses_wrong += len(draft.tokens) - len(drafted)
            events += self._receive(sequence, drafted)
        return events

    def check_integrity(self) -> None:
        """Raises AssertionError unless each slot and page is free or belongs to those that may have it."""
        self._pages.check_integrity({sequence.request.id: sequence.slot for sequence in self._running.values()})
        for sequence in self._running.values():
            assert not sequence.done, f"{sequence.request.id} has ended and still runs"
            assert len(sequence.tokens) <= sequence.scheduled <= sequence.request.max_tokens
            assert sequence.request.id not in self._waiting

    def _look_at_constraints(self) -> None:
        for sequence in list(self._running.values()):
            if sequence.constraint is not None:
                sequence.ready = sequence.constraint.ready
                if problem := sequence.constraint.problem:
                    self._fail(sequence, f"the completion can't go on as its format wants: {problem}", sound=True)

    def _computed(self) -> list[Sequence]:
        """The sequences that a plan may be about, the oldest first."""
        return [self._trial] if self._trial is not None else list(self._running.values())

    def _trial_can_begin(self) -> bool:
        """Whether a request that is on trial may get a slot as soon as no tokens are due."""
        if self._trial is not None or not self._pages.free_slots:
            return False
        return any(entry.request.trial for entry in self._waiting)

    def _grow(self) -> tuple[PageGrant, ...]:
        """Gives each sequence that may decode next the pages that it will write to, the oldest first."""
        grants: list[tuple[Sequence, PageGrant]] = []
        for sequence in self._computed():
            while not sequence.done and sequence.prompt_done and sequence.left > 0 and not self._awaited(sequence):
                ahead = min(sequence.left, max(self._steps, 1 + MAX_DRAFT))
                pool, owner = self._pages.pool(sequence.slot), sequence.request.id
                owned = pool.owned(owner)
                missing = self._shape.pages_for(sequence.position + ahead) - owned
                if missing <= 0:
                    break
                if missing <= pool.free:
                    grants.append((sequence, PageGrant(sequence.slot, owned, pool.grow(owner, missing))))
                    break
                self._preempt(self._shape.group_of(sequence.slot))
        return tuple(grant for sequence, grant in grants if not sequence.done)

    def _preempt(self, group: int) -> None:
        """Takes slot and pages away from the sequence of a group that can best wait."""
        running = [s for s in self._running.values() if self._shape.group_of(s.slot) == group]
        victim = min(reversed(running), key=lambda sequence: (sequence is self._trial, sequence.request.priority))
        self.counts.preemptions += 1
        self._release(victim)
        # Tokens on their way are sampled again. Tokens of a replay that is not over are known all the same.
        known = victim.tokens if len(victim.tokens) > len(victim.request.resumed) else victim.request.resumed
        request = dataclasses.replace(victim.request, resumed=tuple(known), score_from=victim.unscored)
        self._waiting.prepend(Waiting(request, victim.constraint, victim.accepted))

    def _admit(self) -> tuple[SlotStart, ...]:
        """Gives free slots to waiting requests."""
        starts: list[SlotStart] = []
        if not self._pages.free_slots:
            return ()
        slots = collections.Counter(sequence.request.owner for sequence in self._running.values())
        passed_over = 0
        for entry in self._waiting.in_turn(slots):
            if not self._pages.free_slots or passed_over == MAX_PASSED_OVER or self._trial is not None:
                break
            if (
                entry.constraint is not None and not entry.constraint.ready
            ):  # it was preempted, and its mask is on its way
                passed_over += 1
                continue
            if entry.request.trial and self._in_flight:  # a slot has become free since this plan was begun
                break
            request, prefix = entry.request, self._policy.prefix(entry.request)
            # For what is computed before anything is sampled, and a first token.
            pages = min(pages_of(request, self._shape), self._shape.pages_for(len(prefix) + 1))
            # At least one position is left to compute, and all behind which a token is scored.
            reusable = prefix[: len(prefix) - 1 if request.score_from is None else request.score_from - 1]
            place = self._pages.place(self._policy, reusable, pages, request.salt)
            if place is None:
                break
            if self._will_be_shared(reusable, place.cached, request.salt):
                passed_over += 1
                continue
            self._waiting.remove(request.id)
            owned = self._pages.take(request.id, place, pages)
            starts.append(self._start(entry, place.slot, owned, prefix, place.cached))
            slots[request.owner] += 1
        return tuple(starts)

    def _start(
        self, entry: Waiting, slot: int, pages: tuple[int, ...], prefix: tuple[int, ...], cached: int
    ) -> SlotStart:
        request = entry.request
        known, sampling = request.resumed, request.sampling
        forced = self._policy.forced(request)
        sequence = Sequence(request, slot, entry.constraint, entry.accepted, prefix, forced, cached, self._vocab_size)
        sequence.unscored = request.score_from
        if not forced:
            sequence.tokens, sequence.scheduled = list(known), len(known)
        self._running[request.id] = sequence
        if request.trial:
            self._trial = sequence
        self.counts.prompt_tokens_cached += cached
        prompt = request.prompt if sampling.repetition_penalty != 1.0 else ()
        generated = known if sampling.penalized and not forced else ()
        return SlotStart(slot, pages, sampling, request.id, prompt, generated)

    def _will_be_shared(self, reusable: tuple[int, ...], cached: int, salt: str) -> bool:
        """Whether a prompt that is being computed will lengthen the cached part of `reusable`."""
        wanted = self._policy.next_cut(cached)
        return wanted <= len(reusable) and any(
            other.prefilled < wanted <= len(other.prefix)
            and (other.request.salt, other.prefix[:wanted]) == (salt, reusable[:wanted])
            for other in self._running.values()
        )

    def _prefill(self, budget: int) -> Iterator[list[tuple[Sequence, Chunk]]]:
        """Calls that together compute up to `budget` positions of the oldest unfinished prompts (at least one call)."""
        first = True
        while first or budget > 0:
            chunks: dict[int, tuple[Sequence, Chunk]] = {}
            for sequence in self._computed():
                group, most = self._shape.group_of(sequence.slot), self._policy.chunk(budget, first)
                if group in chunks or sequence.prompt_done or most < 1:
                    continue
                if sequence.prefilled + most >= len(sequence.prefix) and not sequence.ready:
                    continue  # what the first token may be is not known yet
                chunk = sequence.chunk(most)
                budget -= len(chunk.tokens)
                chunks[group] = (sequence, chunk)
                pool = self._pages.pool(sequence.slot)
                pool.publish(sequence.request.id, sequence.prefix, sequence.prefilled, sequence.request.salt)
            if not chunks:
                return
            yield [chunks[group] for group in sorted(chunks)]
            first = False

    def _worth_guessing(self) -> frozenset[str]:
        running = self._running
        if len(running) > MAX_VERIFIED:
            return frozenset()
        for least in (LEAST, CONVINCING):
            guessed = {id: s.foreseen for id, s in running.items() if not s.done and s.foreseen >= least}
            if self.speculation.pays(len(running), tuple(guessed.values())):
                return frozenset(guessed)
        return frozenset()

    def _draft(self, ready: list[Sequence]) -> Iterator[tuple[Sequence, Draft]]:
        """Drafts of sequences whose guesses are worth it; such a sequence waits until its tokens are known."""
        for sequence in ready:
            if sequence.request.id in self._guessed and sequence.known and (draft := sequence.draft()) is not None:
                yield sequence, draft

    def _needs_tokens(self, sequence: Sequence) -> bool:
        """Whether a plan for a sequence needs all of its tokens."""
        return sequence.constraint is not None or sequence.request.id in self._guessed

    def _awaited(self, sequence: Sequence) -> bool:
        """Whether nothing can be planned for a sequence until tokens come back."""
        if sequence.drafting or not sequence.ready:
            return True
        return self._needs_tokens(sequence) and not sequence.known

    def _steps_ahead(self, decoding: list[Sequence]) -> int:
        if any(self._needs_tokens(sequence) for sequence in decoding):
            return 1
        return min(sequence.steps(self._steps) for sequence in decoding)

    def _receive(self, sequence: Sequence, tokens: tuple[Token, ...]) -> Iterator[TokenEvent]:
        if sequence.done:
            return
        try:
            for event in sequence.receive(tokens):
                if event.finish is not None:
                    self._end(sequence)
                yield event
        except NoNumbersError:
            self._fail(sequence, NO_NUMBERS, sound=False)
            return
        request = sequence.request
        if sequence is self._trial and len(sequence.tokens) >= len(request.resumed) + TRIAL_TOKENS:
            self._trial = None
        # Where tokens depend on others through the model alone, and verified guesses are exact.
        may_draft = self._policy.drafts and sequence.constraint is None and not request.sampling.penalized
        if may_draft and len(self._running) <= MAX_VERIFIED and sequence.drafter is None and not sequence.done:
            sequence.drafter = NgramDrafter((*request.prompt, *sequence.tokens))

    def _receive_scores(self, sequence: Sequence, scores: tuple[Score, ...]) -> None:
        if sequence.done:
            return
        try:
            event = sequence.receive_scores(scores)
        except NoNumbersError:
            self._fail(sequence, NO_NUMBERS, sound=False)
            return
        self._scores.append(event)
        if event.done:
            self._end(sequence)

    def _fail(self, sequence: Sequence, reason: str, *, sound: bool) -> None:
        self._failures.append(Failure(sequence.request.id, reason))
        self._end(sequence, sound=sound)

    def _end(self, sequence: Sequence, *, sound: bool = True) -> None:
        """Takes a sequence away for good. What one that is not `sound` computed is not shared."""
        if not sound:
            self._pages.pool(sequence.slot).forget(sequence.request.id)
        self._release(sequence, publish=sound)
        if sequence.constraint is not None:
            sequence.constraint.close()

    def _release(self, sequence: Sequence, *, publish: bool = True) -> None:
        sequence.done = True
        if sequence is self._trial:
            self._trial = None
        request = sequence.request
        if self._policy.completions_shared and sequence.prompt_done and publish:
            tokens = (*request.context, *sequence.tokens[:-1])
            self._pages.pool(sequence.slot).publish(request.id, tokens, len(tokens), request.salt)
        del self._running[request.id]
        self._pages.give_back(request.id, sequence.slot)
