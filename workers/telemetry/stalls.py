"""What holds a loop up: finds turns of a loop that take too long, and names the code in which they are."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator

#: Calls of a stack that are named, the innermost first.
_CALLS = 6


class StallWatch:
    """Reports each turn of a loop that takes longer than `limit` seconds: once it is over, with how long it took, for how much
    of that it had a processor, and what ran when it was noticed. Without a limit it does nothing.

    The loop calls `turn` where a turn begins, and waits within `resting`.
    """

    def __init__(self, loop: str, limit: float | None, report: Callable[[str], None]) -> None:
        self._loop = loop
        self._limit = limit
        self._report = report
        self._began: float | None = None
        self._processor = self._used = 0.0
        if limit is not None:
            thread = threading.get_ident()
            threading.Thread(target=self._watch, args=(thread, limit), daemon=True, name="stalls").start()

    @property
    def watching(self) -> bool:
        """Whether there is a limit, as when looking for defects."""
        return self._limit is not None

    def turn(self) -> None:
        """A turn begins, and the one before has ended."""
        if self._limit is not None:
            self._end()
            self._begin()

    @contextlib.contextmanager
    def resting(self) -> Iterator[None]:
        """The loop waits for others while the block runs."""
        self._end()
        try:
            yield
        finally:
            if self._limit is not None:
                self._begin()

    def _begin(self) -> None:
        self._processor = time.thread_time()
        self._began = time.monotonic()

    def _end(self) -> None:
        if self._began is not None:
            self._used, self._began = time.thread_time() - self._processor, None

    def _watch(self, thread: int, limit: float) -> None:
        while True:
            time.sleep(limit / 4)
            began = self._began
            if began is None or time.monotonic() - began <= limit:
                continue
            frame = sys._current_frames().get(thread)
            calls = [] if frame is None else traceback.extract_stack(frame)[-_CALLS:]
            while self._began == began:
                time.sleep(limit / 4)
            took, used = (time.monotonic() - began) * 1e3, self._used * 1e3
            stack = " < ".join(f"{call.name} ({call.filename}:{call.lineno})" for call in reversed(calls))
            self._report(f"{self._loop} stood still for {took:.0f} ms, {used:.0f} of them computing, in {stack}")
