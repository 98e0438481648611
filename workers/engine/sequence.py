"""A request that has a slot: how far plans have taken it, and what came of them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

from workers.engine.drafter import NgramDrafter
from workers.messages.plan import Chunk, DecodeRow, Draft, Mask, Score, Token
from workers.messages.request import Constraint, Finish, Request, ScoreEvent, TokenEvent


class NoNumbersError(ArithmeticError):
    """The model gave a sequence no numbers."""


@dataclasses.dataclass(eq=False)
class Sequence:
    """A request with a slot. Plans run ahead of their results, so there are two counts of its tokens.

    Attributes:
      request: what it is computed for.
      slot: where.
      constraint: which tokens may come next, if it follows a grammar.
      accepted: tokens that the constraint knows.
      prefix: what is computed before anything is sampled.
      forced: tokens that are known before they are sampled, from the first on.
      prefilled: positions of the prefix that plans have covered.
      vocab_size: number of tokens.
      scheduled: tokens that plans sample for certain.
      tokens: those that came back.
      unscored: the first prompt token whose probability is wanted and has not come back.
      drafter: guesses its tokens, where that is allowed.
      drafting: whether a draft is on its way, so that it is unknown how many tokens will come.
      ready: whether it was known what may be sampled next when the plan in the making was begun. A sequence that got no pages
        then must not decode, whatever comes meanwhile.
      ends_barred: whether hosts have a mask that bars stop tokens, None if they have none.
      done: whether it has ended. What still comes for it counts for nothing.
    """

    request: Request
    slot: int
    constraint: Constraint | None
    accepted: int
    prefix: tuple[int, ...]
    forced: tuple[int, ...]
    prefilled: int
    vocab_size: int
    scheduled: int = 0
    tokens: list[int] = dataclasses.field(default_factory=list)
    unscored: int | None = None
    drafter: NgramDrafter | None = None
    drafting: bool = False
    ready: bool = True
    ends_barred: bool | None = None
    done: bool = False

    @property
    def prompt_done(self) -> bool:
        """Whether plans have covered its prefix."""
        return self.prefilled == len(self.prefix)

    @property
    def left(self) -> int:
        """Tokens that may still be planned."""
        return self.request.max_tokens - self.scheduled

    @property
    def position(self) -> int:
        """Where its last scheduled token stands, which the next step reads."""
        return len(self.request.prompt) + self.scheduled - 1

    @property
    def known(self) -> bool:
        """Whether all scheduled tokens have come back."""
        return self.scheduled == len(self.tokens)

    @property
    def foreseen(self) -> float:
        """How many of its last tokens could have been guessed; none where what may be sampled changes with the next ones."""
        return self.drafter.share if self.drafter is not None and self.scheduled > self.request.min_tokens else 0.0

    def chunk(self, most: int) -> Chunk:
        """Schedules up to `most` of its prefix's positions, and a token behind the last of them, if it wants one."""
        start, request = self.prefilled, self.request
        tokens = self.prefix[start : start + most]
        self.prefilled += len(tokens)
        draws = self.prompt_done and request.max_tokens > 0
        self.scheduled += draws
        if request.score_from is None:
            return Chunk(self.slot, start, tokens, draws)
        wanted = range(request.score_from, len(request.prompt))
        behind = range(start + 1, self.prefilled + 1)
        scored = tuple(request.prompt[place] if place in wanted else -1 for place in behind)
        return Chunk(self.slot, start, tokens, draws, scored if max(scored) >= 0 else ())

    def decode(self, steps: int) -> DecodeRow:
        """Schedules `steps` tokens."""
        row = DecodeRow(self.slot, self.position)
        self.scheduled += steps
        return row

    def draft(self) -> Draft | None:
        """A draft, if there are guesses. All scheduled tokens must be known. The sequence then waits for what comes of it."""
        assert self.known
        guesses = self.drafter.propose(self.left - 1) if self.drafter is not None else ()
        if not guesses:
            return None
        self.drafting = True
        return Draft(self.slot, self.position, (self.tokens[-1], *guesses))

    def force_at(self, place: int) -> int | None:
        """The token that must be sampled at a place of the completion, if it is known."""
        return self.forced[place] if place < len(self.forced) else None

    def steps(self, most: int) -> int:
        """How many steps, up to `most`, may be planned at once without another mask or forced token."""
        if self.force_at(self.scheduled) is not None:
            return 1
        early = self.request.min_tokens - self.scheduled
        return min(most, self.left, early if early > 0 else most)

    def mask_at(self, place: int) -> Mask | None:
        """What may be sampled at a place of the completion, if hosts do not know it."""
        if place < len(self.forced):
            return None
        early = place < self.request.min_tokens
        if self.constraint is not None:
            words = self.constraint.mask()
        elif self.request.min_tokens and self.ends_barred is not early:
            words, self.ends_barred = _everything(self.vocab_size), early
        else:
            return None
        return Mask(self.slot, _without(words, self.request.stop_tokens) if early else words)

    def receive_scores(self, scores: tuple[Score, ...]) -> ScoreEvent:
        """Takes what became of the next of its tokens that are scored. Raises NoNumbersError."""
        if any(math.isnan(score.logprob) for score in scores):
            raise NoNumbersError
        assert self.unscored is not None
        self.unscored += len(scores)
        done = self.unscored == len(self.request.prompt)
        if done:
            self.unscored = None
        return ScoreEvent(self.request.id, scores, done and not self.request.max_tokens)

    def receive(self, tokens: tuple[Token, ...]) -> Iterator[TokenEvent]:
        """Takes the next tokens until one of them is the last; what the request gets. Raises NoNumbersError."""
        request = self.request
        for token in tokens:
            if math.isnan(token.logprob):
                raise NoNumbersError
            self.tokens.append(token.id)
            if self.constraint is not None and len(self.tokens) > self.accepted:
                self.constraint.accept(token.id)
                self.accepted += 1
            if self.drafter is not None:
                self.drafter.add(token.id)
            if len(self.tokens) <= len(self.forced):
                continue
            finish = None
            if token.id in request.stop_tokens:
                finish = Finish.EOS
            elif len(self.tokens) == request.max_tokens:
                finish = Finish.LENGTH
            yield TokenEvent(request.id, token, finish)
            if finish is not None:
                return


def _everything(vocab_size: int) -> bytes:
    """The words of a mask that allows all tokens."""
    return ((1 << vocab_size) - 1).to_bytes(-(-vocab_size // 32) * 4, "little")


def _without(words: bytes, tokens: frozenset[int]) -> bytes:
    """The words of a mask without some tokens, unless nothing would be left."""
    kept = int.from_bytes(words, "little") & ~sum(1 << token for token in tokens)
    return kept.to_bytes(len(words), "little") if kept else words
