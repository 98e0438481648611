"""Continuous batching: which sequences run, which prompt positions are computed next, who decodes."""

from __future__ import annotations

import collections
import dataclasses

from workers.engine.pages import PagePool
from workers.engine.plan import Admission, Chunk, EngineShape, Plan, StepTokens, Token
from workers.engine.request import Finish, Load, Refused, Request, TokenEvent


@dataclasses.dataclass(eq=False)
class _Sequence:
    """A request that has a slot.

    `planned` counts prompt positions that plans have covered, `drawn` the tokens that plans draw, `received` the tokens
    that came back: plans run ahead of their results.
    """

    request: Request
    slot: int
    planned: int = 0
    drawn: int = 0
    received: int = 0
    done: bool = False

    @property
    def prompt_done(self) -> bool:
        return self.planned == len(self.request.prompt)


class Scheduler:
    """Turns requests into plans and sampled tokens into events. Single-threaded; knows nothing of devices.

    First come, first served: a request that waits is never overtaken, and all pages that it can ever need are its own from
    admission on, so that it always ends. Each plan prefills at most one chunk a group, so that a long prompt delays
    decoding by one chunk at most.

    A plan may be made before the tokens of the one before are known. A sequence that turns out to have ended meanwhile is
    computed once more, for nothing; its slot and pages may be given away at once, because hosts carry plans out in order.
    """

    def __init__(self, shape: EngineShape, vocab_size: int, max_waiting: int) -> None:
        self._shape = shape
        self._vocab_size = vocab_size
        self._max_waiting = max_waiting
        self._pools = [PagePool(shape.pages) for _ in range(shape.groups)]
        self._free_slots = list(range(shape.slots))
        self._waiting: collections.OrderedDict[str, Request] = collections.OrderedDict()
        self._running: dict[str, _Sequence] = {}
        self._in_flight: collections.deque[tuple[int, list[_Sequence], list[_Sequence]]] = collections.deque()
        self._next_number = 1

    @property
    def load(self) -> Load:
        """How busy the engine is now."""
        return Load(
            running=len(self._running),
            waiting=len(self._waiting),
            pages_used=sum(pool.used for pool in self._pools),
            pages_total=(self._shape.pages - 1) * self._shape.groups,
        )

    def submit(self, request: Request) -> None:
        """Queues a request.

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
        if prompt + request.max_tokens > shape.context:
            raise Refused(
                f"{prompt} prompt tokens and max_tokens={request.max_tokens} exceed the context of {shape.context}"
            )
        if self._pages(request) > shape.pages - 1:
            raise Refused(f"needs {self._pages(request)} pages; the cache has {shape.pages - 1}")
        sampling = request.sampling
        if not 0 <= sampling.top_k <= self._vocab_size:
            raise Refused(f"top_k={sampling.top_k} is outside the vocabulary of {self._vocab_size}")
        ids = (*request.prompt, *(token for token, _ in sampling.logit_bias), *sampling.allowed_tokens)
        if not all(0 <= token < self._vocab_size for token in ids):
            raise Refused(f"a token is outside the vocabulary of {self._vocab_size}")
        if len(self._waiting) >= self._max_waiting:
            raise Refused(f"{len(self._waiting)} requests are waiting already", full=True)
        self._waiting[request.id] = request

    def cancel(self, request_id: str) -> bool:
        """Ends a request without further events; its slot and pages are free for the next plan. False if unknown."""
        if self._waiting.pop(request_id, None) is not None:
            return True
        sequence = self._running.get(request_id)
        if sequence is None:
            return False
        self._release(sequence)
        return True

    def plan(self) -> Plan | None:
        """The next step, or None when there is nothing to compute."""
        admissions = self._admit()
        chunks = self._prefill()
        decoding = [
            sequence
            for sequence in sorted(self._running.values(), key=lambda sequence: sequence.slot)
            if sequence.prompt_done and sequence.drawn < sequence.request.max_tokens
        ]
        if not chunks and not decoding:
            return None
        for sequence in decoding:
            sequence.drawn += 1
        plan = Plan(
            number=self._next_number,
            admissions=admissions,
            prefills=(tuple(chunk for _, chunk in chunks),) if chunks else (),
            decode=tuple(sequence.slot for sequence in decoding),
        )
        self._in_flight.append((plan.number, [sequence for sequence, chunk in chunks if chunk.last], decoding))
        self._next_number += 1
        return plan

    def complete(self, tokens: StepTokens) -> list[TokenEvent]:
        """Takes the tokens of the oldest plan whose tokens are due; returns what its requests get.

        Raises:
          ValueError: the tokens are not that plan's.
        """
        number, prefilled, decoded = self._in_flight.popleft()
        if number != tokens.number:
            raise ValueError(f"tokens of plan {tokens.number} came; those of {number} are due")
        events = []
        for sequence, token in (
            *zip(prefilled, tokens.prefilled, strict=True),
            *zip(decoded, tokens.decoded, strict=True),
        ):
            if not sequence.done:
                events.append(self._receive(sequence, token))
        return events

    def _pages(self, request: Request) -> int:
        # The last token is never read back, so it needs no place in the cache.
        return self._shape.pages_for(len(request.prompt) + request.max_tokens - 1)

    def _admit(self) -> tuple[Admission, ...]:
        admissions = []
        while self._waiting:
            request = next(iter(self._waiting.values()))
            slot = self._slot_for(self._pages(request))
            if slot is None:
                break
            del self._waiting[request.id]
            self._free_slots.remove(slot)
            pages = self._pools[self._shape.group_of(slot)].take(request.id, self._pages(request))
            self._running[request.id] = _Sequence(request, slot)
            admissions.append(Admission(slot, pages, request.sampling, request.id))
        return tuple(admissions)

    def _slot_for(self, pages: int) -> int | None:
        """The lowest free slot of the group with the most free pages, if that has enough."""
        groups = {self._shape.group_of(slot) for slot in self._free_slots}
        roomy = [group for group in groups if self._pools[group].free >= pages]
        if not roomy:
            return None
        best = max(roomy, key=lambda group: (self._pools[group].free, -group))
        return min(slot for slot in self._free_slots if self._shape.group_of(slot) == best)

    def _prefill(self) -> list[tuple[_Sequence, Chunk]]:
        """The next chunk of the oldest unfinished prompt of each group."""
        chunks: dict[int, tuple[_Sequence, Chunk]] = {}
        for sequence in self._running.values():
            group = self._shape.group_of(sequence.slot)
            if group in chunks or sequence.prompt_done:
                continue
            start = sequence.planned
            piece = sequence.request.prompt[start : start + self._shape.chunk]
            sequence.planned += len(piece)
            last = sequence.prompt_done
            sequence.drawn += last
            chunks[group] = (sequence, Chunk(sequence.slot, start, piece, last))
        return [chunks[group] for group in sorted(chunks)]

    def _receive(self, sequence: _Sequence, token: Token) -> TokenEvent:
        sequence.received += 1
        finish = None
        if token.id in sequence.request.stop_tokens:
            finish = Finish.STOP
        elif sequence.received == sequence.request.max_tokens:
            finish = Finish.LENGTH
        if finish is not None:
            self._release(sequence)
        return TokenEvent(sequence.request.id, token, finish)

    def _release(self, sequence: _Sequence) -> None:
        sequence.done = True
        del self._running[sequence.request.id]
        self._free_slots.append(sequence.slot)
        self._pools[self._shape.group_of(sequence.slot)].give_back(sequence.request.id)
