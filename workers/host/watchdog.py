"""Finds steps that take the devices too long."""

from __future__ import annotations

import collections
import contextlib
import math
import threading
import time
from collections.abc import Callable, Iterator

from workers.messages.plan import Plan

#: Seconds that a step may take as long as too few of its kind have been seen.
UNKNOWN_SECONDS = 30.0
#: Steps of a kind that are enough to judge others by, and how many are remembered.
ENOUGH, REMEMBERED = 8, 256
CHECK_SECONDS = 0.05
#: Of the time between two checks at most so much counts: the leader's process itself may have been stopped, or its host busy.
MOST_BETWEEN_CHECKS = 0.25


class Watchdog:
    """Calls `bark`, once, when the devices have kept the leader waiting for 3 times the 99th percentile of such steps and a
    second more, and none of them is `working` still; or when they have for UNKNOWN_SECONDS. On a busy machine steps take
    longer, but do not hang. What the leader's own Python takes between two calls to the devices does not count, nor does time
    that is `excused`.

    Steps of a kind compute as many prompt positions, within a factor of two: others say nothing of them. What a rank that hangs
    does to its mesh can't be distinguished from a slow step in any other way, as nothing returns.
    """

    def __init__(
        self,
        bark: Callable[[str], None],
        working: Callable[[], bool] = lambda: False,
        clock: Callable[[], float] = time.monotonic,
        excused: Callable[[], bool] = lambda: False,
    ) -> None:
        """While it is `excused`, as a rank gives no sign of life, no time counts, and afterwards the count starts anew: whether
        that rank is lost is found out otherwise. So ranks that are stopped briefly, one after the other, are no hang."""
        self._bark = bark
        self._working = working
        self._clock = clock
        self._excused = excused
        self._seconds: dict[int, collections.deque[float]] = collections.defaultdict(
            lambda: collections.deque(maxlen=REMEMBERED)
        )
        self._dispatched: dict[int, float] = {}
        self._last_done = 0.0
        self._waiting: tuple[Plan, float] | None = None
        #: Of the wait that began at this time, the seconds that count, and when the last check was.
        self._counted = (0.0, 0.0, 0.0)

    def start(self) -> None:
        """Checks again and again, in a thread of its own."""

        def watch() -> None:
            while not self.check():
                time.sleep(CHECK_SECONDS)

        threading.Thread(target=watch, daemon=True, name="watchdog").start()

    @contextlib.contextmanager
    def waiting(self, plan: Plan) -> Iterator[None]:
        """The devices are asked to begin a plan's step, or to end it, while the block runs."""
        self._waiting = plan, self._clock()
        try:
            yield
        finally:
            self._waiting = None

    def dispatched(self, plan: Plan) -> None:
        """Notes that the devices have a plan."""
        self._dispatched[plan.number] = self._clock()

    def done(self, plan: Plan) -> None:
        """Notes that a plan's step is done, which began when it was dispatched and the one before was done."""
        now = self._clock()
        self._seconds[_kind(plan)].append(now - max(self._dispatched.pop(plan.number), self._last_done))
        self._last_done = now

    def limit(self, plan: Plan) -> float:
        """Seconds that a plan's step may take."""
        seen = sorted(self._seconds[_kind(plan)])
        if len(seen) < ENOUGH:
            return UNKNOWN_SECONDS
        return 3 * seen[math.ceil(0.99 * len(seen)) - 1] + 1.0

    def check(self) -> bool:
        """Barks if the devices take too long; whether they do."""
        waiting, working = self._waiting, self._working()
        if waiting is None:
            return False
        plan, began = waiting
        now = self._clock()
        seconds, counted = now - began, self._count(began, now)
        if seconds < UNKNOWN_SECONDS and (working or counted < self.limit(plan)):
            return False
        self._bark(f"plan {plan.number} has been running for {seconds:.1f} s; a rank must hang")
        return True

    def _count(self, began: float, now: float) -> float:
        """The seconds that count of a wait which began so."""
        since, seconds, checked = self._counted
        if since != began:
            seconds, checked = 0.0, began
        seconds = 0.0 if self._excused() else seconds + min(now - checked, MOST_BETWEEN_CHECKS)
        self._counted = began, seconds, now
        return seconds


def _kind(plan: Plan) -> int:
    return plan.prompt_tokens.bit_length() * 1000 + plan.steps
