"""Tells when a step takes too long to be one."""

from __future__ import annotations

import collections
import math
import threading
import time
from collections.abc import Callable

from workers.engine.plan import Plan

#: Seconds that a step may take as long as too few of its kind have been seen.
UNKNOWN_SECONDS = 30.0
#: Steps of a kind that are enough to judge others by, and how many are remembered.
ENOUGH, REMEMBERED = 8, 256
CHECK_SECONDS = 0.05


class Watchdog:
    """Calls `bark`, once, when a step has been running for 3 times the 99th percentile of its kind and a second more.

    Steps of a kind compute as many prompt positions, within a factor of two: others say nothing of them. What a rank that hangs
    does to its mesh can't be told from a slow step in any other way, as nothing returns.
    """

    def __init__(self, bark: Callable[[str], None]) -> None:
        self._bark = bark
        self._seconds: dict[int, collections.deque[float]] = collections.defaultdict(
            lambda: collections.deque(maxlen=REMEMBERED)
        )
        self._running: tuple[Plan, float] | None = None
        threading.Thread(target=self._watch, daemon=True, name="watchdog").start()

    def begin(self, plan: Plan) -> None:
        """Notes that the devices have nothing to do before this plan's step."""
        self._running = plan, time.monotonic()

    def end(self, plan: Plan) -> None:
        """Notes that a plan's step is done."""
        running, self._running = self._running, None
        if running is not None and running[0] is plan:
            self._seconds[_kind(plan)].append(time.monotonic() - running[1])

    def limit(self, plan: Plan) -> float:
        """Seconds that a plan's step may take."""
        seen = sorted(self._seconds[_kind(plan)])
        if len(seen) < ENOUGH:
            return UNKNOWN_SECONDS
        return 3 * seen[math.ceil(0.99 * len(seen)) - 1] + 1.0

    def _watch(self) -> None:
        while True:
            time.sleep(CHECK_SECONDS)
            running = self._running
            if running is not None and (seconds := time.monotonic() - running[1]) > self.limit(running[0]):
                self._bark(f"plan {running[0].number} has been running for {seconds:.1f} s; a rank must hang")
                return


def _kind(plan: Plan) -> int:
    return plan.prompt_tokens.bit_length() * 1000 + plan.steps
