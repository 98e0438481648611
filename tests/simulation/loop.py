"""An event loop whose time jumps to the next timer as soon as nothing is left to do."""

from __future__ import annotations

import asyncio
import heapq
import selectors
from typing import Any

BEGIN = 1000.0


class StuckError(Exception):
    """Nothing will ever happen any more."""


class _NoSelector(selectors.SelectSelector):
    """Nothing comes from outside."""

    def select(self, timeout: float | None = None) -> list[Any]:
        del timeout
        return []


class VirtualLoop(asyncio.SelectorEventLoop):
    """`now` is its time in seconds."""

    def __init__(self) -> None:
        self.now = BEGIN
        super().__init__(_NoSelector())

    def time(self) -> float:
        return self.now

    def _run_once(self) -> None:
        # What asyncio keeps for itself: handles that are ready, and timers in a heap.
        loop: Any = self
        if not loop._ready and not loop._stopping:
            while loop._scheduled and loop._scheduled[0]._cancelled:
                loop._timer_cancelled_count -= 1
                heapq.heappop(loop._scheduled)._scheduled = False
            if not loop._scheduled:
                raise StuckError("no timer is set and nothing is ready: all wait for ever")
            self.now = max(self.now, loop._scheduled[0]._when)
        super()._run_once()  # type: ignore[misc]
