"""Which host of a mesh that is being formed does not get on. Pure: what hosts do and times in, an error out."""

from __future__ import annotations

from collections.abc import Sequence

from cluster.controller.placement import HostError
from workers.messages.specs import COMPILING, JOINING, LOADING, PREPARING, WARMING_UP, Progress

#: Seconds that a host may be in a phase without any progress, phases in their order. What it reads from may hang, or another
#: host that it waits for.
STALLED_SECONDS = {
    "starting": 60.0, PREPARING: 120.0, JOINING: 120.0, LOADING: 60.0, COMPILING: 900.0, WARMING_UP: 300.0,
}  # fmt: skip


class Stalls:
    """Remembers since when each host has made no progress."""

    def __init__(self) -> None:
        self._since: dict[int, tuple[Progress, float]] = {}

    def note(self, hosts: Sequence[Progress], now: float) -> None:
        """Takes what all hosts do, in rank order. Raises HostError for one that does not get on."""
        for rank, progress in enumerate(hosts):
            if rank not in self._since or self._since[rank][0] != progress:
                self._since[rank] = progress, now
        stalled = [
            (phase, rank)
            for phase, (name, seconds) in enumerate(STALLED_SECONDS.items())
            for rank, (progress, began) in self._since.items()
            if progress.phase == name and now - began > seconds
        ]
        if stalled:
            _, rank = min(stalled)  # the others may wait for the one that is furthest behind
            progress, began = self._since[rank]
            raise HostError(rank, TimeoutError(f"{progress.phase} for {now - began:.0f} s without progress"))

    def quiet(self, now: float) -> float:
        """Seconds in which no host has made progress."""
        return min((now - began for _, began in self._since.values()), default=0.0)
