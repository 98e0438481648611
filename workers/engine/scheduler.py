"""Continuous batching: which sequences run, which prompt positions are computed next, who decodes."""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Iterator

from workers.engine.drafter import Drafter
from workers.engine.pages import PagePool
from workers.messages.plan import (
    MAX_DRAFT,
    Admission,
    Chunk,
    Draft,
    EngineShape,
    Forced,
    Growth,
    Mask,
    Plan,
    StepTokens,
    Token,
)
from workers.messages.request import Constraint, Failure, Finish, Load, Refused, Request, TokenEvent

#: Waiting requests that a plan passes over, as their prompts will be shared, before it looks at no more.
MAX_PASSED_OVER = 16
#: Rows of a step above which guesses are not computed: the weights that they read are then read anyway, and arithmetic counts.
MAX_DRAFT_ROWS = 8


@dataclasses.dataclass(eq=False)
class _Sequence:
    """A request that has a slot. `prefix` is what is computed before anything is drawn; `forced` are tokens that are known
    before they are drawn.

    `accepted` counts the tokens that its constraint knows, `planned` the prompt positions that plans have covered, `drawn` the
    tokens that plans draw for certain, `tokens` holds those that came back: plans run ahead of their results. While
    `drafting`, it is unknown how many tokens will; `moved` tells that hosts don't know the sequence's position. `ready` tells
    whether it was known what may be drawn next when the plan in the making was begun: who got no pages then must not decode.
    """

    request: Request
    slot: int
    constraint: Constraint | None
    accepted: int
    prefix: tuple[int, ...]
    forced: tuple[int, ...]
    planned: int
    drafter: Drafter | None = None
    drawn: int = 0
    tokens: list[int] = dataclasses.field(default_factory=list)
    drafting: bool = False
    moved: bool = False
    done: bool = False
    ready: bool = True

    @property
    def prompt_done(self) -> bool:
        return self.planned == len(self.prefix)

    @property
    def left(self) -> int:
        """Tokens that may still be planned."""
        return self.request.max_tokens - self.drawn


@dataclasses.dataclass(frozen=True)
class _Waiting:
    """A request without a slot; its constraint knows the first `accepted` of its resumed tokens."""

    request: Request
    constraint: Constraint | None
    accepted: int


@dataclasses.dataclass(frozen=True)
class _InFlight:
    """Who gets the tokens of a plan."""

    number: int
    prefilled: list[_Sequence]
    decoded: list[_Sequence]
    drafted: list[tuple[_Sequence, Draft]]


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

    First come, first served among requests of a priority and an owner; of the owners, who has the fewest slots is first. A
    request is also overtaken while a prompt that begins like its own is being computed, whose pages it will share.

    A sequence gets pages as it grows. When none are left, the one that was admitted last, of the lowest priority, is preempted:
    it waits again, before all others, and is resumed later. The oldest of the highest priority never is, and all pages together
    hold any request, so that one ends, and then the next.

    Each plan computes at most `prompt_budget` prompt positions while others decode, so that a long prompt delays them by that
    much at most.

    A plan may be made before the tokens of the one before are known. A sequence that turns out to have ended meanwhile is
    computed once more, for nothing; its slot and pages may be given away at once, because hosts carry plans out in order.
    Sequences with a grammar or a draft wait for their tokens.

    A request that is resumed goes on as if it had never ended. Where a position's numbers do not depend on what computes it,
    its tokens are computed like a prompt. Elsewhere they are decoded one by one, as they were when they were drawn, and plans
    say which ones they are.
    """

    def __init__(self, shape: EngineShape, vocab_size: int, max_waiting: int, steps: int = 1) -> None:
        self._shape = shape
        self._vocab_size = vocab_size
        self._max_waiting = max_waiting
        self._steps = steps
        self._pools = [PagePool(shape.pages, shape.page_size) for _ in range(shape.groups)]
        self._free_slots = list(range(shape.slots))
        self._waiting: dict[str, _Waiting] = {}
        self._running: dict[str, _Sequence] = {}
        self._in_flight: collections.deque[_InFlight] = collections.deque()
        self._next_number = 1
        # Whether so few run that guesses are computed. Fixed while a plan is made, as who waits for tokens is given no pages.
        self._few = True
        self._failures: list[Failure] = []
        self.prompt_budget = shape.chunk
        self.counts = Counts()

    @property
    def load(self) -> Load:
        """How busy the engine is now."""
        pages = (self._shape.pages - 1) * self._shape.groups
        return Load(
            running=len(self._running),
            waiting=len(self._waiting),
            pages_used=sum(pool.used for pool in self._pools),
            pages_total=pages,
            pages_cached=sum(pool.cached for pool in self._pools),
            positions=pages * self._shape.page_size,
        )

    def submit(self, request: Request, constraint: Constraint | None = None) -> None:
        """Queues a request, with what its grammar allows after `request.resumed` if it has one.

        Raises:
          Refused: it can never be served (too long, or not well formed), or the queue is full.
        """
        prompt, shape = len(request.prompt), self._shape
        if request.id in self._waiting or request.id in self._running:
            raise Refused(f"request id {request.id} is in use")
        if prompt == 0:
            raise Refused("the prompt is empty")
        if request.max_tokens < 1:
            raise Refused(f"max_tokens={request.max_tokens} must be at least 1")
        if len(request.resumed) >= request.max_tokens:
            raise Refused(f"resumes after {len(request.resumed)} tokens of max_tokens={request.max_tokens}")
        if prompt + request.max_tokens > shape.context:
            raise Refused(
                f"{prompt} prompt tokens and max_tokens={request.max_tokens} exceed the context of {shape.context}"
            )
        if self._pages(request) > shape.pages - 1:
            raise Refused(f"needs {self._pages(request)} pages; the cache has {shape.pages - 1}")
        sampling = request.sampling
        if not 0 <= sampling.top_k <= self._vocab_size:
            raise Refused(f"top_k={sampling.top_k} is outside the vocabulary of {self._vocab_size}")
        ids = (
            *request.prompt,
            *request.resumed,
            *(token for token, _ in sampling.logit_bias),
            *sampling.allowed_tokens,
        )
        if not all(0 <= token < self._vocab_size for token in ids):
            raise Refused(f"a token is outside the vocabulary of {self._vocab_size}")
        if len(self._waiting) >= self._max_waiting:
            raise Refused(f"{len(self._waiting)} requests are waiting already", full=True)
        self._waiting[request.id] = _Waiting(request, constraint, len(request.resumed))

    def cancel(self, request_id: str) -> bool:
        """Ends a request without further events; its slot and pages are free for the next plan. False if unknown."""
        if (waiting := self._waiting.pop(request_id, None)) is not None:
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

    def plan(self) -> Plan | None:
        """The next step, or None when there is nothing to compute before tokens come back."""
        for sequence in list(self._running.values()):
            if sequence.constraint is not None:
                sequence.ready = sequence.constraint.ready
                if problem := sequence.constraint.problem:
                    self._fail(sequence, f"the completion can't go on as its format wants: {problem}", sound=True)
        self._few = len(self._running) <= MAX_DRAFT_ROWS // (1 + MAX_DRAFT)
        growths = self._grow()
        admissions = self._admit()
        others_decode = any(sequence.prompt_done for sequence in self._running.values())
        calls = list(self._prefill(self.prompt_budget if others_decode else self._shape.chunk))
        last = [sequence for call in calls for sequence, chunk in call if chunk.last]
        ready = [s for s in self._running.values() if s.prompt_done and s.left > 0 and not self._awaited(s)]
        ready = [s for s in ready if not (s.forced and s in last)]  # a plan has one mask, or forced token, for a slot
        ready.sort(key=lambda sequence: sequence.slot)
        drafts = list(self._draft(ready))
        decoding = [s for s in ready if not s.drafting]
        if not calls and not decoding and not drafts:
            assert not growths, "who grows decodes"
            assert not admissions, "who is admitted is computed"
            return None
        steps = self._steps_ahead(decoding) if not calls and not drafts and not self._waiting else 1
        places = [(s, s.drawn - 1) for s in last] + [(s, s.drawn) for s in decoding]
        forced = tuple(Forced(s.slot, s.forced[place]) for s, place in places if place < len(s.forced))
        masks = tuple(
            Mask(s.slot, s.constraint.mask())
            for s, place in places
            if place >= len(s.forced) and s.constraint is not None
        )
        for sequence in decoding:
            sequence.drawn += steps
        plan = Plan(
            number=self._next_number,
            admissions=admissions,
            masks=masks,
            prefills=tuple(tuple(chunk for _, chunk in call) for call in calls),
            decode=tuple(sequence.slot for sequence in decoding),
            drafts=tuple(draft for _, draft in drafts),
            steps=steps,
            growths=growths,
            forced=forced,
        )
        self._in_flight.append(_InFlight(plan.number, last, decoding, drafts))
        self._next_number += 1
        self.counts.prompt_tokens_computed += plan.prompt_tokens
        return plan

    def complete(self, tokens: StepTokens) -> list[TokenEvent]:
        """Takes the tokens of the oldest plan whose tokens are due; returns what its requests get.

        Raises:
          ValueError: the tokens are not that plan's.
        """
        due = self._in_flight.popleft()
        if due.number != tokens.number:
            raise ValueError(f"tokens of plan {tokens.number} came; those of {due.number} are due")
        events: list[TokenEvent] = []
        for sequence, token in zip(due.prefilled, tokens.prefilled, strict=True):
            events += self._receive(sequence, (token,))
        for sequence, decoded in zip(due.decoded, tokens.decoded, strict=True):
            events += self._receive(sequence, decoded)
        for (sequence, draft), drafted in zip(due.drafted, tokens.drafted, strict=True):
            sequence.drawn += len(drafted)
            sequence.drafting = False
            self.counts.guesses_right += len(drafted) - 1
            self.counts.guesses_wrong += len(draft.tokens) - len(drafted)
            events += self._receive(sequence, drafted)
        return events

    def _pages(self, request: Request) -> int:
        # The last token is never read back, so it needs no place in the cache.
        return self._shape.pages_for(len(request.prompt) + request.max_tokens - 1)

    def _first_pages(self, request: Request) -> int:
        """Pages that it starts with: for what is computed before anything is drawn, and a first token."""
        return min(self._pages(request), self._shape.pages_for(len(self._prefix(request)) + 1))

    def _admit(self) -> tuple[Admission, ...]:
        admissions: list[Admission] = []
        if not self._waiting or not self._free_slots:
            return ()
        queues: dict[tuple[int, str], collections.deque[tuple[int, _Waiting]]] = {}
        for order, entry in enumerate(self._waiting.values()):
            queues.setdefault((-entry.request.priority, entry.request.owner), collections.deque()).append(
                (order, entry)
            )
        places = collections.Counter(sequence.request.owner for sequence in self._running.values())
        passed_over = 0
        while queues and self._free_slots and passed_over < MAX_PASSED_OVER:
            best = min(queues, key=lambda key: (key[0], places[key[1]], queues[key][0][0]))
            _, first = queues[best].popleft()
            if not queues[best]:
                del queues[best]
            request = first.request
            if (
                first.constraint is not None and not first.constraint.ready
            ):  # it was preempted, and its mask is on its way
                passed_over += 1
                continue
            placed = self._place(request)
            if placed is None:
                break
            slot, shared = placed
            cached = len(shared) * self._shape.page_size
            if self._will_be_shared(request, cached):
                passed_over += 1
                continue
            del self._waiting[request.id]
            self._free_slots.remove(slot)
            pool = self._pools[self._shape.group_of(slot)]
            pages = pool.take(request.id, shared, self._first_pages(request) - len(shared))
            admissions.append(self._start(first, slot, pages, cached))
            places[request.owner] += 1
        return tuple(admissions)

    def _grow(self) -> tuple[Growth, ...]:
        """Gives each sequence that may decode next the pages that it will write to, the oldest first."""
        grown: list[tuple[_Sequence, Growth]] = []
        for sequence in list(self._running.values()):
            while not sequence.done and sequence.prompt_done and sequence.left > 0 and not self._awaited(sequence):
                request, group = sequence.request, self._shape.group_of(sequence.slot)
                pool = self._pools[group]
                ahead = min(sequence.left, max(self._steps, 1 + MAX_DRAFT))
                owned = pool.owned(request.id)
                missing = self._shape.pages_for(len(request.prompt) + sequence.drawn - 1 + ahead) - owned
                if missing <= 0:
                    break
                if missing <= pool.free:
                    grown.append((sequence, Growth(sequence.slot, owned, pool.grow(request.id, missing))))
                    break
                self._preempt(group)
        return tuple(growth for sequence, growth in grown if not sequence.done)

    def _preempt(self, group: int) -> None:
        """Takes slot and pages away from the sequence of a group that can best wait."""
        running = [s for s in self._running.values() if self._shape.group_of(s.slot) == group]
        victim = min(reversed(running), key=lambda sequence: sequence.request.priority)
        self.counts.preemptions += 1
        self._release(victim)
        # Tokens on their way are drawn again. Tokens of a replay that is not over are known all the same.
        known = victim.tokens if len(victim.tokens) > len(victim.request.resumed) else victim.request.resumed
        request = dataclasses.replace(victim.request, resumed=tuple(known))
        self._waiting = {request.id: _Waiting(request, victim.constraint, victim.accepted), **self._waiting}

    def _start(self, entry: _Waiting, slot: int, pages: tuple[int, ...], cached: int) -> Admission:
        request = entry.request
        known, sampling = request.resumed, request.sampling
        forced = () if self._shape.exact_rows else known
        sequence = _Sequence(
            request, slot, entry.constraint, entry.accepted, self._prefix(request), forced, planned=cached
        )
        if not forced:
            sequence.tokens, sequence.drawn = list(known), len(known)
        self._running[request.id] = sequence
        self.counts.prompt_tokens_cached += cached
        prompt = request.prompt if sampling.repetition_penalty != 1.0 else ()
        drawn = known if sampling.penalized and not forced else ()
        return Admission(slot, pages, sampling, request.id, prompt, drawn)

    def _prefix(self, request: Request) -> tuple[int, ...]:
        return (*request.prompt, *request.resumed) if self._shape.exact_rows else request.prompt

    def _place(self, request: Request) -> tuple[int, tuple[int, ...]] | None:
        """The lowest free slot of the group with the longest cached prefix, then the most free pages, if one has enough;
        and that prefix's pages."""
        groups = {self._shape.group_of(slot) for slot in self._free_slots}
        found = {group: self._shared(request, group) for group in groups}
        needed = self._first_pages(request)
        # A page for each that runs, lest the next of them to grow preempts the newcomer at once.
        growing = collections.Counter(self._shape.group_of(s.slot) for s in self._running.values())
        roomy = [g for g in groups if self._pools[g].can_take(found[g], needed - len(found[g]) + growing[g])]
        if not roomy:
            return None
        best = max(roomy, key=lambda group: (len(found[group]), self._pools[group].free, -group))
        return min(slot for slot in self._free_slots if self._shape.group_of(slot) == best), found[best]

    def _shared(self, request: Request, group: int) -> tuple[int, ...]:
        """Cached pages of the prompt that leave at least one position to compute, where a chunk may begin."""
        pages = self._pools[group].match(self._prefix(request)[:-1])
        if self._shape.exact_rows:
            return pages
        aligned = math.lcm(self._shape.chunk, self._shape.page_size) // self._shape.page_size
        return pages[: len(pages) // aligned * aligned]

    def _will_be_shared(self, request: Request, cached: int) -> bool:
        """Whether a prompt that is being computed will lengthen the cached prefix."""
        wanted = cached + self._shape.page_size
        if not self._shape.exact_rows:
            wanted = -(-wanted // math.lcm(self._shape.chunk, self._shape.page_size))
            wanted *= math.lcm(self._shape.chunk, self._shape.page_size)
        prefix = self._prefix(request)
        if wanted >= len(prefix):
            return False
        return any(
            other.planned < wanted <= len(other.prefix) and other.prefix[:wanted] == prefix[:wanted]
            for other in self._running.values()
        )

    def _prefill(self, budget: int) -> Iterator[list[tuple[_Sequence, Chunk]]]:
        """Calls that together compute up to `budget` positions of the oldest unfinished prompts (at least one call)."""
        first = True
        while first or budget > 0:
            chunks: dict[int, tuple[_Sequence, Chunk]] = {}
            for sequence in self._running.values():
                group = self._shape.group_of(sequence.slot)
                if group in chunks or sequence.prompt_done:
                    continue
                # Cut anywhere only where that changes no bits.
                most = self._shape.chunk
                if self._shape.exact_rows:
                    most = max(1, min(most, budget))
                elif not first and budget < most:
                    continue
                start = sequence.planned
                piece = sequence.prefix[start : start + most]
                if start + len(piece) == len(sequence.prefix) and not sequence.ready:
                    continue  # what the first token may be is not known yet
                sequence.planned += len(piece)
                budget -= len(piece)
                sequence.drawn += sequence.prompt_done
                chunks[group] = (sequence, Chunk(sequence.slot, start, piece, sequence.prompt_done))
                self._pools[group].publish(sequence.request.id, sequence.prefix[: sequence.planned])
                if budget <= 0 and self._shape.exact_rows:
                    break
            if not chunks:
                return
            yield [chunks[group] for group in sorted(chunks)]
            first = False

    def _draft(self, ready: list[_Sequence]) -> Iterator[tuple[_Sequence, Draft]]:
        """Drafts of sequences whose guesses are worth it; such a sequence waits until its tokens are known.

        Hosts don't know how far a draft took a sequence. So after one comes another, or one without guesses, after which
        they do.
        """
        for sequence in ready:
            if sequence.drawn != len(sequence.tokens) or not sequence.tokens:
                continue
            drafter = sequence.drafter
            guesses = drafter.guesses(sequence.left - 1) if self._few and drafter is not None and drafter.worth else ()
            if not guesses and not sequence.moved:
                continue
            sequence.drafting, sequence.moved = True, bool(guesses)
            position = len(sequence.request.prompt) + sequence.drawn - 1
            yield sequence, Draft(sequence.slot, position, (sequence.tokens[-1], *guesses))

    def _needs_tokens(self, sequence: _Sequence) -> bool:
        """Whether a plan for a sequence needs all of its tokens."""
        drafter = sequence.drafter
        return (
            sequence.constraint is not None or sequence.moved or (self._few and drafter is not None and drafter.worth)
        )

    def _awaited(self, sequence: _Sequence) -> bool:
        """Whether nothing can be planned for a sequence until tokens come back."""
        if sequence.drafting or not sequence.ready:
            return True
        return self._needs_tokens(sequence) and sequence.drawn != len(sequence.tokens)

    def _steps_ahead(self, decoding: list[_Sequence]) -> int:
        if any(self._needs_tokens(s) or (s.forced and s.drawn <= len(s.forced)) for s in decoding):
            return 1
        return max(1, min(self._steps, *(sequence.left for sequence in decoding)))

    def _receive(self, sequence: _Sequence, tokens: tuple[Token, ...]) -> Iterator[TokenEvent]:
        for token in tokens:
            if sequence.done:
                return
            request = sequence.request
            if math.isnan(token.logprob):
                self._fail(sequence, "the model gave no numbers", sound=False)
                return
            sequence.tokens.append(token.id)
            if sequence.constraint is not None and len(sequence.tokens) > sequence.accepted:
                sequence.constraint.accept(token.id)
                sequence.accepted += 1
            self._watch(sequence, token.id)
            if len(sequence.tokens) <= len(sequence.forced):
                continue
            finish = None
            if token.id in request.stop_tokens:
                finish = Finish.STOP
            elif len(sequence.tokens) == request.max_tokens:
                finish = Finish.LENGTH
            if finish is not None:
                self._end(sequence)
            yield TokenEvent(request.id, token, finish)

    def _watch(self, sequence: _Sequence, token: int) -> None:
        """Lets the drafter learn. There is one where drafts are exact and tokens depend on others through the model alone."""
        request = sequence.request
        if not self._shape.exact_rows or sequence.constraint is not None or request.sampling.penalized:
            return
        if sequence.drafter is not None:
            sequence.drafter.add(token)
        elif self._few:
            sequence.drafter = Drafter((*request.prompt, *sequence.tokens))

    def _fail(self, sequence: _Sequence, reason: str, *, sound: bool) -> None:
        self._failures.append(Failure(sequence.request.id, reason))
        self._end(sequence, sound=sound)

    def _end(self, sequence: _Sequence, *, sound: bool = True) -> None:
        """Takes a sequence away for good. What one that is not `sound` computed is shared with nobody."""
        if not sound:
            self._pools[self._shape.group_of(sequence.slot)].forget(sequence.request.id)
        self._release(sequence, publish=sound)
        if sequence.constraint is not None:
            sequence.constraint.close()

    def _release(self, sequence: _Sequence, *, publish: bool = True) -> None:
        sequence.done = True
        request, pool = sequence.request, self._pools[self._shape.group_of(sequence.slot)]
        if self._shape.exact_rows and sequence.prompt_done and publish:
            pool.publish(request.id, (*request.prompt, *sequence.tokens[:-1]))
        del self._running[request.id]
        self._free_slots.append(sequence.slot)
        pool.give_back(request.id)
