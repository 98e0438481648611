"""What the engine is asked for, and what it answers."""

from __future__ import annotations

import dataclasses
import enum
from typing import Protocol

from workers.messages.plan import Sampling, Score, Token

#: Tokens after which a request that is on trial does not break what computes it.
TRIAL_TOKENS = 8


@dataclasses.dataclass(frozen=True)
class Request:
    """A prompt to be continued.

    Attributes:
      id: unique among the engine's current requests; see `belongs`.
      prompt: token ids, at least one.
      max_tokens: most tokens to draw; prompt and these must fit the context. None only if prompt tokens are scored.
      sampling: how to draw.
      stop_tokens: a token of these ends the completion (and is reported as its last token).
      min_tokens: tokens that there must be before one of `stop_tokens` may be sampled. If there must be any, `sampling.masked`.
      priority: requests of a higher one are admitted first.
      grammar: what its tokens must spell, as `workers.text.grammar` has it; empty for anything.
      owner: of the request. Of a priority, the requests of the owner with the fewest slots go first.
      resumed: its first tokens, which an engine that is gone has generated already; fewer than `max_tokens`.
      trial: whether it may be what breaks engines. It is computed alone until TRIAL_TOKENS more have come.
      salt: only requests of the same one share cached pages.
      score_from: the first prompt token whose probability is wanted, and that of all behind it, counted from 0, which has none.
        None if no one's is.
    """

    id: str
    prompt: tuple[int, ...]
    max_tokens: int
    sampling: Sampling
    stop_tokens: frozenset[int] = frozenset()
    min_tokens: int = 0
    priority: int = 0
    grammar: str = ""
    resumed: tuple[int, ...] = ()
    owner: str = ""
    trial: bool = False
    score_from: int | None = None
    salt: str = ""

    @property
    def context(self) -> tuple[int, ...]:
        """The prompt tokens that are computed: of the last one only the probability is wanted if none is drawn behind it."""
        return self.prompt if self.max_tokens else self.prompt[:-1]


def belongs(request_id: str, call: str) -> bool:
    """Whether a request is a call's, or one of several: they have its name and a number behind it."""
    return request_id == call or request_id.startswith((f"{call}-", f"{call}."))


class Constraint(Protocol):
    """Which tokens may come next in a completion that must follow a grammar. Another process may work it out."""

    @property
    def ready(self) -> bool:
        """Whether the mask is known, or that there will be none."""

    @property
    def problem(self) -> str:
        """Why the completion can't go on; empty if it can."""

    def mask(self) -> bytes:
        """A bit for each token, as in `workers.messages.plan.Mask`; at least one is set. For when it is ready without a
        problem."""

    def accept(self, token: int) -> None: ...

    def close(self) -> None:
        """Ends it: no more is asked."""


class Finish(enum.Enum):
    """Why a completion ended: by its end token, or as it is as long as it may be."""

    EOS = "eos"
    LENGTH = "length"


@dataclasses.dataclass(frozen=True)
class Ahead:
    """A request on a replica, as far as it matters to those behind it.

    Attributes:
      positions: of its prompt and of tokens that it resumes from.
      tokens: that it may generate, at most.
      generated: of them so far.
      priority: see Request.
    """

    positions: int
    tokens: int
    generated: int = 0
    priority: int = 0

    @classmethod
    def of(cls, request: Request, generated: int = 0) -> Ahead:
        """A request that has generated so many tokens, without those that it resumes from."""
        resumed = len(request.resumed)
        return cls(len(request.prompt) + resumed, request.max_tokens - resumed, generated, request.priority)


@dataclasses.dataclass(frozen=True)
class Timing:
    """Where the seconds until a request's first token went.

    Attributes:
      queue: from its arrival at the leader to its slot.
      prefill: from its slot to its first token.
      computed: positions that were computed before that; the prefix cache had the others.
    """

    queue: float
    prefill: float
    computed: int


@dataclasses.dataclass(frozen=True)
class TokenEvent:
    """A request's next token; with the last one comes the reason why it is, with the first what it waited for."""

    request_id: str
    token: Token
    finish: Finish | None
    timing: Timing | None = None


@dataclasses.dataclass(frozen=True)
class ScoreEvent:
    """What became of the next prompt tokens that a request wants scored. `done` if that is all that it wants, then with
    what it waited for."""

    request_id: str
    scores: tuple[Score, ...]
    done: bool = False
    timing: Timing | None = None


@dataclasses.dataclass(frozen=True)
class Failure:
    """A request that ended before its completion was whole, and why."""

    request_id: str
    reason: str


@dataclasses.dataclass(frozen=True)
class Load:
    """How busy an engine is. `pages_cached` hold prefixes that may be shared, owned or not; all pages hold `positions`."""

    slots: int = 0
    running: int = 0
    waiting: int = 0
    pages_used: int = 0
    pages_total: int = 0
    pages_cached: int = 0
    positions: int = 0


class Refused(Exception):  # noqa: N818
    """A request that the engine does not take. `full`: whether it may be sent again later."""

    def __init__(self, reason: str, *, full: bool = False) -> None:
        super().__init__(reason)
        self.full = full
