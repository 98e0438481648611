"""Which completions are admitted: by what is in the gateway, in all and of a key, and by how long they would wait."""

from __future__ import annotations

import collections
import contextlib
import math
import time
from collections.abc import Callable, Iterator, Mapping

from cluster.controller.ledger import KeyState, KeyUse
from cluster.gateway.auth.api_keys import ANONYMOUS, Caller
from cluster.gateway.errors import KEY_LIMIT, Violation, exhausted, invalid, unavailable
from cluster.telemetry import metrics

#: A deadline must leave so many times the time that is forecast.
MARGIN = 1.5


class Admission:
    """Admits up to a fixed number of completions, and none that would likely wait too long for a slot: longer than
    `queue_seconds`, or than its deadline leaves. None once draining. The answer is always immediate.

    A key has the limits of its own that the file of keys gives it. Besides, none may hold more places than it leaves free, so
    that one that floods the gateway leaves half of it to the others.
    """

    def __init__(
        self, limit: int, queue_seconds: float = math.inf, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._limit = limit
        self._queue_seconds = queue_seconds
        self._clock = clock
        self._by_key: collections.Counter[str] = collections.Counter()
        self._buckets: dict[str, _Bucket] = {}
        #: Requests of keys in other gateways.
        self._elsewhere: dict[str, int] = {}
        self.in_flight = 0
        self.draining = False

    @contextlib.contextmanager
    def admitted(self, caller: Caller, count: int = 1) -> Iterator[None]:
        """Holds places for a request of so many completions while the block runs. Raises GatewayError as `check` does."""
        self.check(caller, count)
        self._change(caller, count)
        try:
            yield
        finally:
            self._change(caller, -count)

    def check_wait(self, wait: float, left: float | None, own: float = 0.0) -> None:
        """Raises GatewayError (RESOURCE_EXHAUSTED) if a completion would wait too long.

        Args:
          wait: seconds until it likely has a slot.
          left: of its deadline, None without one.
          own: seconds that it likely takes itself. One that its deadline could not hold even so is admitted all the same while
            no other request waits: it may be shorter than others were.
        """
        most = self._queue_seconds if left is None else min(self._queue_seconds, max(left / MARGIN - own, 0.0))
        if wait > most:
            metrics.REJECTIONS.labels("queue").inc()
            raise exhausted(
                f"a slot is likely to be free in {wait:.1f} s only, and this request may wait {most:.1f} s",
                retry_seconds=max(wait - most, 0.1),
            )

    def check(self, caller: Caller, count: int = 1) -> None:
        """Raises GatewayError if there are not so many places for a caller: RESOURCE_EXHAUSTED, UNAVAILABLE when draining,
        INVALID_ARGUMENT if there never will be."""
        most = self._limit if caller.max_requests is None else min(self._limit, caller.max_requests)
        if count > most:
            raise invalid(
                [Violation("completion.n", f"is {count}; at most {most} completions at once are allowed here")]
            )
        if self.draining:
            metrics.REJECTIONS.labels("draining").inc()
            raise unavailable("the gateway is shutting down")
        own, free = self._by_key[caller.name], self._limit - self.in_flight
        everywhere = own + self._elsewhere.get(caller.name, 0)
        if free < count:
            metrics.REJECTIONS.labels("full").inc()
            raise exhausted(f"{self.in_flight} requests are in the gateway already", retry_seconds=1.0)
        if (caller.max_requests is not None and everywhere + count > caller.max_requests) or (
            caller != ANONYMOUS and own + count > free
        ):
            metrics.REJECTIONS.labels("key_requests").inc()
            raise exhausted(f"{everywhere} requests of this key are under way already", 1.0, KEY_LIMIT)
        if caller.tokens_per_minute is not None:
            wait = self._bucket(caller.name, caller.tokens_per_minute).wait(self._clock())
            if wait > 0:
                metrics.REJECTIONS.labels("key_tokens").inc()
                raise exhausted(f"this key has {caller.tokens_per_minute} tokens a minute", wait, KEY_LIMIT)

    def used(self, caller: Caller, tokens: int) -> None:
        """Charges a key for what a completion took."""
        if caller.tokens_per_minute is not None:
            self._bucket(caller.name, caller.tokens_per_minute).take(tokens, self._clock())

    def uses(self) -> dict[str, KeyUse]:
        """What keys use of this gateway, for the other ones."""
        now = self._clock()
        found = {
            name: KeyUse(requests=count) for name, count in self._by_key.items() if count and name != ANONYMOUS.name
        }
        for name, bucket in self._buckets.items():
            found[name] = KeyUse(bucket.per_minute, bucket.spent, bucket.missing(now), self._by_key[name])
        return found

    def learn(self, reported: Mapping[str, KeyUse], states: Mapping[str, KeyState]) -> None:
        """Takes over what gateways together know of keys since this one `reported` its uses."""
        now = self._clock()
        self._elsewhere = {name: state.elsewhere for name, state in states.items()}
        for name, state in states.items():
            use = reported.get(name, KeyUse())
            if state.per_minute is not None and use.per_minute in (None, state.per_minute):
                bucket = self._bucket(name, state.per_minute)
                bucket.set_missing(state.missing + bucket.spent - use.spent, now)

    def _bucket(self, name: str, per_minute: int) -> _Bucket:
        bucket = self._buckets.get(name)
        if bucket is None or bucket.per_minute != per_minute:  # the file of keys may have changed
            bucket = self._buckets[name] = _Bucket(per_minute, self._clock())
        return bucket

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
        self.per_minute = per_minute
        self._rate = per_minute / 60
        self._most = self._level = float(per_minute)
        self._filled = now
        #: All that was ever taken.
        self.spent = 0.0

    def wait(self, now: float) -> float:
        """Seconds until something is in it."""
        self._fill(now)
        return max(0.0, (1.0 - self._level) / self._rate)

    def take(self, tokens: float, now: float) -> None:
        """Takes tokens out of it."""
        self._fill(now)
        self._level -= tokens
        self.spent += tokens

    def missing(self, now: float) -> float:
        """Tokens until it is full."""
        self._fill(now)
        return self._most - self._level

    def set_missing(self, tokens: float, now: float) -> None:
        """Has so many tokens missing from now on."""
        self._level, self._filled = self._most - tokens, now

    def _fill(self, now: float) -> None:
        self._level = min(self._most, self._level + (now - self._filled) * self._rate)
        self._filled = now
