"""How long first tokens took lately."""

from __future__ import annotations

import collections
import time
from collections.abc import Callable

#: Seconds that count as lately.
WINDOW_SECONDS = 60.0
#: More samples than this are thinned by forgetting the oldest.
MOST_SAMPLES = 10_000


class RecentLatency:
    """Times to first token of the last WINDOW_SECONDS."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._samples: collections.deque[tuple[float, float]] = collections.deque(maxlen=MOST_SAMPLES)

    def add(self, seconds: float) -> None:
        """Adds the seconds of a request."""
        self._samples.append((self._clock(), seconds))

    def quantile(self, fraction: float) -> float:
        """The smallest time that at least `fraction` of the samples do not exceed; 0 without samples."""
        oldest = self._clock() - WINDOW_SECONDS
        while self._samples and self._samples[0][0] < oldest:
            self._samples.popleft()
        times = sorted(seconds for _, seconds in self._samples)
        return times[min(int(fraction * len(times)), len(times) - 1)] if times else 0.0
