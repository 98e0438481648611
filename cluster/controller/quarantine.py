"""Which hosts lose workers. Pure: losses and times in, decisions out."""

from __future__ import annotations

import collections

#: Seconds that a host is avoided after it lost a worker; twice as many after each further one that it loses meanwhile or within
#: MEMORY_SECONDS, but never more than these.
AVOIDED_SECONDS, MEMORY_SECONDS = 30.0, 600.0
#: Workers lost within MEMORY_SECONDS after which a host is abandoned, with or without a standby, if another can take its place.
TOO_MANY = 3
#: A worker that says itself what is wrong counts as so many that were lost.
RAISED = 2


class Quarantine:
    """Remembers the hosts, by the ids of their Ray nodes, whose workers were lost lately."""

    def __init__(self) -> None:
        self._losses: dict[str, collections.deque[float]] = {}

    def lost(self, node: str, now: float, count: int = 1) -> None:
        """Notes that a host's worker was lost at `now`. Nodes without a name are ignored."""
        if node:
            self._losses.setdefault(node, collections.deque(maxlen=16)).extend([now] * count)

    def avoided(self, now: float) -> tuple[str, ...]:
        """The hosts on which no worker should be started if there are others, first those that lost one last."""
        found = [
            node
            for node in list(self._losses)
            if (count := self._count(node, now))
            and now - self._losses[node][-1] < min(AVOIDED_SECONDS * 2 ** (count - 1), MEMORY_SECONDS)
        ]
        return tuple(sorted(found, key=lambda node: -self._losses[node][-1]))

    def failing(self, now: float) -> frozenset[str]:
        """The hosts that lose workers again and again."""
        return frozenset(node for node in list(self._losses) if self._count(node, now) >= TOO_MANY)

    def _count(self, node: str, now: float) -> int:
        losses = self._losses[node]
        while losses and now - losses[0] > MEMORY_SECONDS:
            losses.popleft()
        if not losses:
            del self._losses[node]
        return len(losses)
