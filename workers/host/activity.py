"""Which ranks of a mesh use their processors: where these do the computing, that shows whether a step is slow or hangs."""

from __future__ import annotations

import collections
import threading
import time

#: Seconds that are looked back, and the share of them that a rank must have had a processor to be at work. A rank that waits
#: for others uses a few hundredths, for its pulses and for Ray's.
WINDOW_SECONDS, WORKING_SHARE = 1.0, 0.1


class Activity:
    """Remembers how much processor time ranks have used. Any thread may call it."""

    def __init__(self) -> None:
        self._used: dict[int, collections.deque[tuple[float, float]]] = {}
        self._lock = threading.Lock()

    def note(self, rank: int, seconds: float, now: float | None = None) -> None:
        """A rank's process has used so many seconds of processors since it began."""
        now = time.monotonic() if now is None else now
        with self._lock:
            used = self._used.setdefault(rank, collections.deque())
            used.append((now, seconds))
            while used[0][0] < now - WINDOW_SECONDS:
                used.popleft()

    def working(self, now: float | None = None) -> bool:
        """Whether any rank has been at work lately."""
        now = time.monotonic() if now is None else now
        with self._lock:
            for used in self._used.values():
                lately = [seconds for at, seconds in used if at >= now - WINDOW_SECONDS]
                if lately and lately[-1] - lately[0] >= WORKING_SHARE * WINDOW_SECONDS:
                    return True
        return False
