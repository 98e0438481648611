"""Requests that wait for a slot, and whose turn it is."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterator, Mapping

from workers.messages.request import Constraint, Request


@dataclasses.dataclass(frozen=True)
class Waiting:
    """A request without a slot; its constraint knows the first `accepted` of its resumed tokens."""

    request: Request
    constraint: Constraint | None
    accepted: int


class WaitingQueue:
    """First come, first served among requests of a priority and an owner. Of the owners, the one with the fewest slots comes
    first."""

    def __init__(self) -> None:
        self._entries: dict[str, Waiting] = {}

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._entries

    def __iter__(self) -> Iterator[Waiting]:
        return iter(self._entries.values())

    def append(self, entry: Waiting) -> None:
        """Adds a request behind all others."""
        self._entries[entry.request.id] = entry

    def prepend(self, entry: Waiting) -> None:
        """Adds a request before all others."""
        self._entries = {entry.request.id: entry, **self._entries}

    def remove(self, request_id: str) -> Waiting | None:
        """Takes a request out, if it is there."""
        return self._entries.pop(request_id, None)

    def in_turn(self, slots: Mapping[str, int]) -> Iterator[Waiting]:
        """The requests as their turns come. `slots` counts each owner's slots and is looked at again for each turn, so that it
        may change in between. Requests that are to be admitted must be removed."""
        queues: dict[tuple[int, str], collections.deque[tuple[int, Waiting]]] = {}
        for order, entry in enumerate(self._entries.values()):
            key = (-entry.request.priority, entry.request.owner)
            queues.setdefault(key, collections.deque()).append((order, entry))
        while queues:
            best = min(queues, key=lambda key: (key[0], slots.get(key[1], 0), queues[key][0][0]))
            _, entry = queues[best].popleft()
            if not queues[best]:
                del queues[best]
            yield entry
