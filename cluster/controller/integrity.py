"""Whether all hosts have loaded the same weights, by the digests of the parts that they hold, and whether meshes compute the
same with them. Pure."""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Mapping, Sequence

#: By so much logarithmic probabilities may differ between kernels; wrong weights move them by more.
CANARY_TOLERANCE = 0.1


@dataclasses.dataclass(frozen=True)
class Difference:
    """A rank that holds other bytes of a part than is recorded, or than others do."""

    rank: int
    part: str
    others: str


class Digests:
    """Remembers the digests of all parts that any host has loaded, of all replicas and epochs. What is recorded beside the
    checkpoint is right; else what most nodes hold, and of as many what was loaded first."""

    def __init__(self, recorded: Mapping[str, int]) -> None:
        self._recorded = recorded
        self._first: dict[str, int] = {}
        self._held: dict[str, dict[str, int]] = collections.defaultdict(dict)

    def check(self, nodes: Sequence[str], loaded: Sequence[Mapping[str, int]]) -> Difference | None:
        """Notes what the ranks of a mesh have loaded, on which nodes; the first that differs, if any does."""
        for node, parts in zip(nodes, loaded, strict=True):
            for part, value in parts.items():
                self._first.setdefault(part, value)
                self._held[part][node] = value
        for rank, parts in enumerate(loaded):
            for part, value in parts.items():
                if part in self._recorded and value != self._recorded[part]:
                    return Difference(rank, part, "what is recorded")
                if part not in self._recorded and value != self._right(part):
                    return Difference(rank, part, "others, or than it was before")
        return None

    def _right(self, part: str) -> int:
        votes = collections.Counter({self._first[part]: 0})  # the first of equals
        votes.update(self._held[part].values())
        votes[self._first[part]] = max(votes[self._first[part]], 1)
        return votes.most_common(1)[0][0]

    def checked(self, loaded: Sequence[Mapping[str, int]]) -> tuple[int, int]:
        """How many of these parts were compared with anything, and how many there are."""
        parts = set().union(*loaded)
        return sum(part in self._recorded or len(self._held[part]) > 1 for part in parts), len(parts)


class Canary:
    """Compares what meshes compute of one token, as logarithmic probabilities: all must come to what the first came to, as far
    as other kernels do. If two in a row on different hosts come to something else, it was the first that was wrong."""

    def __init__(self) -> None:
        self._expected: Sequence[float] = ()
        self._doubted: Sequence[float] = ()
        self._doubted_on: frozenset[str] = frozenset()

    def accept(self, found: Sequence[float], nodes: Sequence[str]) -> bool:
        """Whether a mesh on these hosts that came to this may serve."""
        if not all(map(math.isfinite, found)):
            return False
        confirmed = _alike(found, self._doubted) and self._doubted_on != frozenset(nodes)
        if not self._expected or confirmed or _alike(found, self._expected):
            self._expected, self._doubted = tuple(found), ()
            return True
        self._doubted, self._doubted_on = tuple(found), frozenset(nodes)
        return False


def _alike(one: Sequence[float], other: Sequence[float]) -> bool:
    return len(one) == len(other) and all(abs(a - b) <= CANARY_TOLERANCE for a, b in zip(one, other, strict=True))
