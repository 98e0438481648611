"""Devices that compute no model, but notice whatever is wrong with a plan: they keep, for each page, the tokens whose keys
would lie there, and a token follows from all tokens that the page table leads to."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence

from workers.messages.plan import EngineShape, Plan, Score, StepTokens, Token
from workers.model.config import GrokConfig

EOS = 2
#: Tokens of prompts that break whatever computes them, and from which no numbers come.
BREAKING, NO_NUMBERS = 2040, 2041


def next_token(seed: int, tokens: Sequence[int]) -> int:
    """Often what stood some places before, so that guesses are worth it; now and then the end."""
    mixed = hash((seed, len(tokens), *tokens))
    if mixed % 8 and len(tokens) > 6:
        return tokens[-5]
    return EOS if mixed % 97 == 0 else 3 + (mixed >> 8) % 2000


def score(tokens: Sequence[int]) -> Score:
    """What becomes of the last token behind the others."""
    mixed = hash(("score", *tokens))
    return Score(-(mixed % 1000) / 64, 1 + mixed % 50)


@functools.lru_cache(4096)
def completion(prompt: tuple[int, ...], seed: int, most: int) -> tuple[int, ...]:
    """What a request gets when nothing goes wrong."""
    tokens: list[int] = []
    while len(tokens) < most and EOS not in tokens:
        tokens.append(next_token(seed, [*prompt, *tokens]))
    return tuple(tokens)


@dataclasses.dataclass(frozen=True)
class SimPending:
    """A plan, and the tokens that its step will bring."""

    plan: Plan
    tokens: StepTokens


class SimDevices:
    """What the leader takes for its runtime."""

    host_computes = False

    def __init__(self, shape: EngineShape, alone: Callable[[], bool]) -> None:
        """`alone`: a plan must be of one request."""
        self._alone = alone
        self.shape, self.config = shape, GrokConfig(num_layers=2)
        self._pages: dict[tuple[int, int], int] = {}
        self._tables: dict[int, list[int]] = {}
        self._last: dict[int, int] = {}
        self._seeds: dict[int, int] = {}
        self._forced: dict[int, int] = {}

    def execute(self, plan: Plan) -> SimPending:
        chunks = [chunk for call in plan.prefills for chunk in call]
        slots = {chunk.slot for chunk in chunks} | {row.slot for row in plan.decode} | {d.slot for d in plan.drafts}
        assert len(slots) <= 1 or not self._alone(), "others are computed beside a request that is on trial"
        for grant in plan.grants:
            assert len(self._tables[grant.slot]) == grant.first, "pages are granted out of order"
            self._tables[grant.slot].extend(grant.pages)
        for start in plan.starts:
            self._tables[start.slot], self._seeds[start.slot] = list(start.pages), start.sampling.seed
        self._forced = {forced.slot: forced.token for forced in plan.forced}
        prefilled, scored = [], []
        for chunk in chunks:
            if BREAKING in chunk.tokens:
                raise RuntimeError("XlaRuntimeError: INTERNAL")
            for place, token in enumerate(chunk.tokens, chunk.start):
                self._put(chunk.slot, place, token)
            if chunk.scored:
                places = enumerate(chunk.scored, chunk.start + 1)
                scored.append(tuple(self._score(chunk.slot, place, token) for place, token in places if token >= 0))
            if chunk.last:
                prefilled.append(self._sample(chunk.slot, chunk.start + len(chunk.tokens)))
        decoded = []
        for row in plan.decode:
            tokens = []
            for place in range(row.position, row.position + plan.steps):
                self._put(row.slot, place, self._last[row.slot])
                tokens.append(self._sample(row.slot, place + 1))
            decoded.append(tuple(tokens))
        drafted = []
        for draft in plan.drafts:
            right = []
            for place, token in enumerate(draft.tokens):
                self._put(draft.slot, draft.position + place, token)
                right.append(self._sample(draft.slot, draft.position + place + 1))
                if place + 1 < len(draft.tokens) and right[-1].id != draft.tokens[place + 1]:
                    break
            drafted.append(tuple(right))
        counts = ((1,) * 8, (2,) * 8)
        results = StepTokens(plan.number, tuple(prefilled), tuple(decoded), tuple(drafted), counts, tuple(scored))
        return SimPending(plan, results)

    def probe(self) -> float:
        return 0.0

    def wait(self, pending: SimPending) -> None:
        del pending

    def _put(self, slot: int, position: int, token: int) -> None:
        size = self.shape.page_size
        self._pages[self._tables[slot][position // size], position % size] = token

    def _before(self, slot: int, position: int) -> list[int]:
        """What the pages before a position hold."""
        size, table = self.shape.page_size, self._tables[slot]
        return [self._pages[table[place // size], place % size] for place in range(position)]

    def _score(self, slot: int, position: int, token: int) -> Score:
        return score([*self._before(slot, position), token])

    def _sample(self, slot: int, position: int) -> Token:
        """The token at a position, from what the pages before it hold."""
        before = self._before(slot, position)
        token = self._forced.pop(slot, None)
        self._last[slot] = next_token(self._seeds[slot], before) if token is None else token
        return Token(self._last[slot], math.nan if NO_NUMBERS in before else -1.0, ())
