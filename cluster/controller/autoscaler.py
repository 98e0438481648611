"""How many replicas there should be. Pure: load in, decision out."""

from __future__ import annotations

import dataclasses

from cluster.config.schema import AutoscalingSection


@dataclasses.dataclass(frozen=True)
class Signals:
    """How the service is doing.

    Attributes:
      now: seconds of a clock that never goes back.
      replicas: that are wanted so far.
      ready: that serve.
      sessions: requests on them.
      queued: those of them without a first token.
      slots: of one replica.
      time_to_first_token: seconds, of the slowest tenth of recent requests.
    """

    now: float
    replicas: int
    ready: int
    sessions: int
    queued: int
    slots: int
    time_to_first_token: float


class Autoscaler:
    """Adds a replica when requests have waited too much for long enough, takes one away when one fewer would do with half of
    its slots; one at a time, and none is added while the last one is not there yet."""

    def __init__(self, policy: AutoscalingSection, fewest: int) -> None:
        self._policy = policy
        self._fewest = fewest
        self._most = policy.max_replicas or fewest
        self._pressed_since: float | None = None
        self._relaxed_since: float | None = None

    def wanted(self, signals: Signals) -> int:
        """How many replicas there should be from now on."""
        policy, count = self._policy, signals.replicas
        pressed = (
            signals.queued > policy.queue_per_replica * signals.ready
            # Of requests that may have left already: without any, it is no reason to grow.
            or (signals.sessions > 0 and signals.time_to_first_token > policy.time_to_first_token)
        )
        relaxed = not pressed and signals.queued == 0 and signals.sessions <= signals.slots * (count - 1) / 2
        self._pressed_since = _since(self._pressed_since, pressed and signals.ready >= count, signals.now)
        self._relaxed_since = _since(self._relaxed_since, relaxed, signals.now)
        if _lasted(self._pressed_since, policy.up_seconds, signals.now) and count < self._most:
            count += 1
        elif _lasted(self._relaxed_since, policy.down_seconds, signals.now) and count > self._fewest:
            count -= 1
        if count != signals.replicas:
            self._pressed_since = self._relaxed_since = None
        return count


def _since(before: float | None, holds: bool, now: float) -> float | None:
    return (now if before is None else before) if holds else None


def _lasted(since: float | None, seconds: float, now: float) -> bool:
    return since is not None and now - since >= seconds
