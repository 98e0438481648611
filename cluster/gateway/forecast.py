"""How long a request would wait, from what is ahead of it and from how fast requests went lately."""

from __future__ import annotations

import dataclasses
import heapq
from collections.abc import Iterable

from workers.engine.request import Request

#: Weight of the latest request in the averages.
AGING = 0.1


@dataclasses.dataclass(frozen=True)
class Ahead:
    """A request that is on a replica, and how many tokens of it have been drawn."""

    request: Request
    drawn: int


@dataclasses.dataclass(frozen=True)
class Capacity:
    """What a replica has for the requests on it."""

    slots: int
    positions: int


class Forecast:
    """Learns what requests take: seconds a token once it has a slot, and how much of `max_tokens` is drawn.

    What is on a replica is then played through: who comes next has a slot when one of those before it has ended, if they
    leave none.
    """

    def __init__(self) -> None:
        self._token: float | None = None
        self._used = 1.0

    def learn(self, request: Request, drawn: int, seconds: float, *, whole: bool = True) -> None:
        """Notes a request of which `drawn` tokens, at least one, took `seconds` from its slot on. One that is not whole, as its
        client left, tells how fast tokens come but not how many."""
        token, used = seconds / drawn, drawn / (request.max_tokens - len(request.resumed))
        self._token = token if self._token is None else self._token + AGING * (token - self._token)
        if whole:
            self._used += AGING * (used - self._used)

    def own(self, request: Request) -> float:
        """Seconds that a request will likely take once it has a slot."""
        return (self._token or 0.0) * self._left(request, len(request.resumed))

    def wait(self, ahead: Iterable[Ahead], capacity: Capacity) -> float:
        """Seconds until a newcomer has a slot; 0 as long as nothing is known."""
        before = list(ahead)
        if not before or self._token is None or not capacity.slots:
            return 0.0
        lengths = sum(len(a.request.prompt) + a.request.max_tokens * self._used for a in before) / len(before)
        together = max(1, min(capacity.slots, int(capacity.positions / lengths)))
        ends: list[float] = []
        for one in sorted(before, key=lambda one: one.drawn == 0):  # who draws has a slot; the sort is stable
            began = heapq.heappop(ends) if len(ends) == together else 0.0
            heapq.heappush(ends, began + self._left(one.request, one.drawn) * self._token)
        return ends[0] if len(ends) == together else 0.0

    def _left(self, request: Request, drawn: int) -> float:
        return max(1.0, request.max_tokens * self._used - drawn)
