"""The frames between gateways and leaders of PROTOCOL 1, frozen: what a peer of that release sends and reads."""

from __future__ import annotations

import dataclasses
import enum


@dataclasses.dataclass(frozen=True)
class Sampling:
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int = 0
    logit_bias: tuple[tuple[int, float], ...] = ()
    allowed_tokens: tuple[int, ...] = ()
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    masked: bool = False
    top_logprobs: int = 0


@dataclasses.dataclass(frozen=True)
class Request:
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


@dataclasses.dataclass(frozen=True)
class Token:
    id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclasses.dataclass(frozen=True)
class Timing:
    queue: float
    prefill: float
    computed: int


class Finish(enum.Enum):
    EOS = "eos"
    LENGTH = "length"


@dataclasses.dataclass(frozen=True)
class TokenEvent:
    request_id: str
    token: Token
    finish: Finish | None
    timing: Timing | None = None


@dataclasses.dataclass(frozen=True)
class Load:
    slots: int = 0
    running: int = 0
    waiting: int = 0
    pages_used: int = 0
    pages_total: int = 0
    pages_cached: int = 0
    positions: int = 0


class RefusalKind(enum.Enum):
    INVALID = "invalid"
    FULL = "full"
    FAILED = "failed"


@dataclasses.dataclass(frozen=True)
class Refusal:
    request_id: str
    reason: str
    kind: RefusalKind


@dataclasses.dataclass(frozen=True)
class LayerGroup:
    first_layer: int
    last_layer: int
    expert_tokens: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Status:
    compilations: int = 0
    layer_groups: tuple[LayerGroup, ...] = ()


@dataclasses.dataclass(frozen=True)
class Hello:
    epoch: int
    secret: bytes
    rank: int | None = None
    protocol: int = 1


@dataclasses.dataclass(frozen=True)
class LeaderInput:
    submit: Request | None = None
    cancel: str = ""


@dataclasses.dataclass(frozen=True)
class LeaderOutput:
    epoch: int
    tokens: tuple[TokenEvent, ...] = ()
    refusals: tuple[Refusal, ...] = ()
    load: Load | None = None
    status: Status | None = None
    canary: tuple[float, ...] = ()
