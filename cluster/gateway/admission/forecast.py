"""How long a request would wait, from what is ahead of it and from how fast requests went lately."""

from __future__ import annotations

import dataclasses
import heapq
from collections.abc import Iterable

from workers.messages.request import Ahead, Request

#: Weight of the latest request in the averages.
AGING = 0.1


@dataclasses.dataclass(frozen=True)
class Capacity:
    """What a replica has for the requests on it."""

    slots: int
    positions: int


class Forecast:
    """Learns what requests take once they have a slot: seconds a prompt position, seconds a token after the first, and how much
    of `max_tokens` is generated.

    The replica's queue is then played through: a request has a slot when one of those before it has ended, if they
    leave none.
    """

    def __init__(self) -> None:
        self._position: float | None = None
        self._token: float | None = None
        self._used = 1.0

    def learn(self, request: Request, generated: int, prefill: float, decode: float, *, whole: bool = True) -> None:
        """Notes a request: seconds until its first token, and from that to the last one of `generated`, at least one. One that
        is not whole, as its client left, shows how fast tokens come but not how many."""
        self._position = _averaged(self._position, prefill / Ahead.of(request).positions)
        if generated > 1:
            self._token = _averaged(self._token, decode / (generated - 1))
        if whole:
            self._used = _averaged(self._used, generated / (request.max_tokens - len(request.resumed)))

    def own(self, request: Request) -> float:
        """Seconds that a request will likely take once it has a slot."""
        return self._left(Ahead.of(request))

    def wait(self, ahead: Iterable[Ahead], capacity: Capacity) -> float:
        """Seconds until a newcomer has a slot; 0 as long as nothing is known."""
        before = list(ahead)
        if not before or self._position is None or not capacity.slots:
            return 0.0
        lengths = sum(a.positions + a.tokens * self._used for a in before) / len(before)
        together = max(1, min(capacity.slots, int(capacity.positions / lengths)))
        ends: list[float] = []
        # Those with tokens have a slot, and so come first; the sort is stable.
        for one in sorted(before, key=lambda one: one.generated == 0):
            began = heapq.heappop(ends) if len(ends) == together else 0.0
            heapq.heappush(ends, began + self._left(one))
        return ends[0] if len(ends) == together else 0.0

    def _left(self, one: Ahead) -> float:
        """Seconds that a request still takes."""
        positions = 0 if one.generated else one.positions
        tokens = max(1.0, one.tokens * self._used - one.generated)
        return positions * (self._position or 0.0) + tokens * (self._token or 0.0)


def _averaged(average: float | None, latest: float) -> float:
    return latest if average is None else average + AGING * (latest - average)
