"""How many completions may be in the gateway at once, in all and of a key."""

from __future__ import annotations

import collections
import contextlib
import time
from collections.abc import Callable, Iterator

from cluster.gateway.errors import exhausted, unavailable
from cluster.gateway.keys import ANONYMOUS, Caller
from cluster.telemetry import metrics


class Admission:
    """Admits up to a fixed number of completions, and none once draining. The answer is always immediate.

    A key has the limits of its own that the file of keys gives it. Besides, none may hold more places than it leaves free, so
    that one that floods the gateway leaves half of it to the others.
    """

    def __init__(self, limit: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._limit = limit
        self._clock = clock
        self._by_key: collections.Counter[str] = collections.Counter()
        self._buckets: dict[str, _Bucket] = {}
        self.in_flight = 0
        self.draining = False

    @contextlib.contextmanager
    def admitted(self, caller: Caller) -> Iterator[None]:
        """Holds a place while the block runs. Raises GatewayError: RESOURCE_EXHAUSTED, or UNAVAILABLE when draining."""
        if self.draining:
            metrics.REJECTIONS.labels("draining").inc()
            raise unavailable("the gateway is shutting down")
        own, free = self._by_key[caller.name], self._limit - self.in_flight
        if free <= 0:
            metrics.REJECTIONS.labels("full").inc()
            raise exhausted(f"{self.in_flight} requests are in the gateway already", retry_seconds=1.0)
        if (caller.max_requests is not None and own >= caller.max_requests) or (caller != ANONYMOUS and own >= free):
            metrics.REJECTIONS.labels("key_requests").inc()
            raise exhausted(f"{own} requests of this key are in the gateway already", retry_seconds=1.0)
        if caller.tokens_per_minute is not None:
            wait = self._bucket(caller, caller.tokens_per_minute).wait(self._clock())
            if wait > 0:
                metrics.REJECTIONS.labels("key_tokens").inc()
                raise exhausted(f"this key has {caller.tokens_per_minute} tokens a minute", retry_seconds=wait)
        self._change(caller, 1)
        try:
            yield
        finally:
            self._change(caller, -1)

    def used(self, caller: Caller, tokens: int) -> None:
        """Charges a key for what a completion took."""
        if caller.tokens_per_minute is not None:
            self._bucket(caller, caller.tokens_per_minute).take(tokens, self._clock())

    def _bucket(self, caller: Caller, per_minute: int) -> _Bucket:
        return self._buckets.setdefault(caller.name, _Bucket(per_minute, self._clock()))

    def _change(self, caller: Caller, by: int) -> None:
        self.in_flight += by
        self._by_key[caller.name] += by
        metrics.IN_FLIGHT.set(self.in_flight)


class _Bucket:
    """Tokens that a key may use: it fills up with time, to a minute's worth.

    As a completion is charged when it has ended, there may be less than nothing in it; then nothing is admitted until there is
    something again.
    """

    def __init__(self, per_minute: int, now: float) -> None:
        self._rate = per_minute / 60
        self._most = self._level = float(per_minute)
        self._filled = now

    def wait(self, now: float) -> float:
        """Seconds until something is in it."""
        self._fill(now)
        return max(0.0, (1.0 - self._level) / self._rate)

    def take(self, tokens: int, now: float) -> None:
        """Takes tokens out of it."""
        self._fill(now)
        self._level -= tokens

    def _fill(self, now: float) -> None:
        self._level = min(self._most, self._level + (now - self._filled) * self._rate)
        self._filled = now
