"""Who owns which page of the KV cache."""

from __future__ import annotations

import heapq


class PagePool:
    """Pages 1 to `pages - 1` of one group; page 0 belongs to padding and is never handed out.

    Pages are handed out lowest first, so that the same history always places sequences alike.
    """

    def __init__(self, pages: int) -> None:
        self._free = list(range(1, pages))
        self._owned: dict[str, tuple[int, ...]] = {}

    @property
    def free(self) -> int:
        """Number of pages that nobody owns."""
        return len(self._free)

    @property
    def used(self) -> int:
        """Number of pages that are owned."""
        return sum(map(len, self._owned.values()))

    def take(self, owner: str, count: int) -> tuple[int, ...]:
        """Hands `count` pages to `owner`, who must have none.

        Raises:
          ValueError: the owner has pages, or fewer than `count` are free.
        """
        if owner in self._owned:
            raise ValueError(f"{owner} owns pages already")
        if count > len(self._free):
            raise ValueError(f"{count} pages wanted, {len(self._free)} free")
        pages = tuple(heapq.heappop(self._free) for _ in range(count))
        self._owned[owner] = pages
        return pages

    def give_back(self, owner: str) -> None:
        """Frees all pages of `owner`.

        Raises:
          KeyError: the owner has none.
        """
        for page in self._owned.pop(owner):
            heapq.heappush(self._free, page)
