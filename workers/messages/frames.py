"""What the streams of a replica carry: between the leader and its followers, and between the leader and gateways."""

from __future__ import annotations

import dataclasses
import enum

from workers.messages.plan import Plan
from workers.messages.request import Ahead, Load, Request, ScoreEvent, TokenEvent

#: Version of the frames. It changes when a peer that does not know a change would do something wrong. A field that is added
#: with a default is no such change.
PROTOCOL = 1


@dataclasses.dataclass(frozen=True)
class Hello:
    """The first frame of a follower (with its `rank`, and its `liveness` as in RankSpec) or a gateway to the leader."""

    epoch: int
    secret: bytes = dataclasses.field(repr=False)
    rank: int | None = None
    protocol: int = PROTOCOL
    liveness: str = ""


@dataclasses.dataclass(frozen=True)
class PlanFrame:
    """A plan of an epoch, from the leader to a follower."""

    epoch: int
    plan: Plan


@dataclasses.dataclass(frozen=True)
class Done:
    """From a follower to the leader: the last plan that it has carried out, 0 if this is only a sign of life, and the processor
    time that its process has used so far."""

    number: int = 0
    processor_seconds: float = 0.0


@dataclasses.dataclass(frozen=True)
class LeaderInput:
    """From a gateway to the leader: a request; or the id of one of its own that is forgotten, or of a call, of whichever
    gateway, whose requests are cancelled. Without any it is only a sign of life."""

    submit: Request | None = None
    cancel: str = ""
    abort: str = ""


class RefusalKind(enum.Enum):
    """Why a request gets no (more) tokens."""

    INVALID = "invalid"
    FULL = "full"
    FAILED = "failed"


@dataclasses.dataclass(frozen=True)
class Refusal:
    """The leader does not take a request, or can't go on with it; `cancelled` if it was told to."""

    request_id: str
    reason: str
    kind: RefusalKind
    cancelled: bool = False


@dataclasses.dataclass(frozen=True)
class LayerGroup:
    """How many tokens each expert of a group of layers has computed, `first_layer` to `last_layer`, [E]."""

    first_layer: int
    last_layer: int
    expert_tokens: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Status:
    """What a replica's leader reports about once a second: programs compiled since warm-up, its experts' work, and requests
    that have come by other streams than the one that carries this."""

    compilations: int = 0
    layer_groups: tuple[LayerGroup, ...] = ()
    others: tuple[Ahead, ...] = ()


@dataclasses.dataclass(frozen=True)
class LeaderOutput:
    """From the leader to a gateway, after each step: the tokens of the gateway's requests. Without a load it is only a sign of
    life, or news of a trial. `canary` comes with the first one that has a load: logarithmic probabilities of the epoch's first
    token. `trying` is the request, of whichever gateway, that the devices compute alone from now on as it is on trial; empty if
    none is any more. `scores` come before the tokens of their requests."""

    epoch: int
    tokens: tuple[TokenEvent, ...] = ()
    refusals: tuple[Refusal, ...] = ()
    load: Load | None = None
    status: Status | None = None
    canary: tuple[float, ...] = ()
    trying: str | None = None
    scores: tuple[ScoreEvent, ...] = ()
