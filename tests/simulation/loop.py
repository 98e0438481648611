"""An event loop whose time jumps to the next timer as soon as nothing is left to do."""

from __future__ import annotations

import asyncio
import contextvars
import heapq
import itertools
import selectors
from collections.abc import Callable
from typing import Any, TypeVarTuple

BEGIN = 1000.0
Arguments = TypeVarTuple("Arguments")
#: The process to which the task that runs belongs, and whatever it begins.
OWNER: contextvars.ContextVar[object] = contextvars.ContextVar("owner", default=None)


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
        self._paused: dict[object, list[Any]] = {}
        #: With a number for the order of those at one time.
        self._timers: list[tuple[float, int, asyncio.TimerHandle]] = []
        self._numbers = itertools.count()
        super().__init__(_NoSelector())

    def time(self) -> float:
        return self.now

    def call_at(
        self,
        when: float,
        callback: Callable[[*Arguments], object],
        *args: *Arguments,
        context: contextvars.Context | None = None,
    ) -> asyncio.TimerHandle:
        # asyncio's own timers are compared by Python code.
        timer = asyncio.TimerHandle(when, callback, args, self, context)
        heapq.heappush(self._timers, (when, next(self._numbers), timer))
        return timer

    def pause(self, owner: object) -> None:
        """Runs nothing of an owner any more."""
        self._paused.setdefault(owner, [])

    def resume(self, owner: object) -> None:
        """Goes on with what has become ready meanwhile."""
        loop: Any = self
        loop._ready.extend(self._paused.pop(owner, ()))

    def _run_once(self) -> None:
        # In place of asyncio's own, which asks the kernel each time.
        loop: Any = self
        ready, timers = loop._ready, self._timers
        while timers and timers[0][2].cancelled():
            heapq.heappop(timers)
        if not ready and not loop._stopping:
            if not timers:
                raise StuckError("no timer is set and nothing is ready: all wait for ever")
            self.now = max(self.now, timers[0][0])
        while timers and timers[0][0] <= self.now:
            ready.append(heapq.heappop(timers)[2])
        for _ in range(len(ready)):
            handle = ready.popleft()
            if handle._cancelled:
                continue
            if self._paused and (held := self._paused.get(handle._context.get(OWNER))) is not None:
                held.append(handle)
                continue
            handle._run()
