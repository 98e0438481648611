"""Who owns which page of the KV cache, and which pages hold prefixes that others may share."""

from __future__ import annotations

import collections
import dataclasses
import heapq

Tokens = tuple[int, ...]


@dataclasses.dataclass(eq=False)
class _Cached:
    """A page whose tokens are known. Its `parent` holds the tokens before; the chain spells a prefix."""

    key: tuple[_Cached | None, Tokens]
    page: int


class PagePool:
    """Pages 1 to `pages - 1` of one group; page 0 belongs to padding and is never handed out.

    Full pages whose tokens are known form a tree of prefixes. They may be owned by several sequences, and stay behind when
    nobody owns them, until their space is needed: the longest unused go first. Nobody writes to a shared page, as a
    sequence computes only positions after the prefix that it shares.

    Pages are handed out lowest first, so that the same history always places sequences alike.
    """

    def __init__(self, pages: int, page_size: int) -> None:
        self._size = page_size
        self._free = list(range(1, pages))
        self._owned: dict[str, tuple[int, ...]] = {}
        self._owners: collections.Counter[int] = collections.Counter()
        self._tree: dict[tuple[_Cached | None, Tokens], _Cached] = {}
        self._by_page: dict[int, _Cached] = {}
        # Cached pages without owner, the longest unused first. A page is given back before the one that it follows, and
        # whoever owns it owns that one too: so the first is never followed by another.
        self._idle: collections.OrderedDict[int, None] = collections.OrderedDict()
        # Owned pages that nobody may share any more, nor what follows them.
        self._unsound: set[int] = set()

    @property
    def free(self) -> int:
        """Number of pages that nobody owns, cached ones included."""
        return len(self._free) + len(self._idle)

    @property
    def used(self) -> int:
        """Number of pages that are owned."""
        return len(self._owners)

    @property
    def cached(self) -> int:
        """Number of pages that hold a known prefix, owned or not."""
        return len(self._by_page)

    def match(self, tokens: Tokens) -> tuple[int, ...]:
        """The pages of the longest cached prefix of `tokens`, full pages only."""
        pages: list[int] = []
        node: _Cached | None = None
        for start in range(0, len(tokens) - self._size + 1, self._size):
            node = self._tree.get((node, tokens[start : start + self._size]))
            if node is None:
                break
            pages.append(node.page)
        return tuple(pages)

    def can_take(self, shared: tuple[int, ...], count: int) -> bool:
        """Whether `take` would find its pages."""
        return count <= self.free - sum(page in self._idle for page in shared)

    def take(self, owner: str, shared: tuple[int, ...], count: int) -> tuple[int, ...]:
        """Hands the cached pages `shared` and `count` others to `owner`, who must have none.

        Raises:
          ValueError: the owner has pages, or too few are free.
        """
        if owner in self._owned:
            raise ValueError(f"{owner} owns pages already")
        if not self.can_take(shared, count):
            raise ValueError(f"{count} pages wanted besides {len(shared)} shared ones, {self.free} free")
        for page in shared:
            self._idle.pop(page, None)
        pages = (*shared, *(self._take_one() for _ in range(count)))
        self._owned[owner] = pages
        self._owners.update(pages)
        return pages

    def grow(self, owner: str, count: int) -> tuple[int, ...]:
        """Hands `count` more pages to `owner`. Raises ValueError if too few are free."""
        if count > self.free:
            raise ValueError(f"{count} pages wanted, {self.free} free")
        pages = tuple(self._take_one() for _ in range(count))
        self._owned[owner] += pages
        self._owners.update(pages)
        return pages

    def owned(self, owner: str) -> int:
        """Number of pages that `owner` has."""
        return len(self._owned[owner])

    def publish(self, owner: str, tokens: Tokens) -> None:
        """Lets others share the pages of `owner` that are full of `tokens`, its sequence from the start."""
        node: _Cached | None = None
        for i, page in enumerate(self._owned[owner][: len(tokens) // self._size]):
            if page in self._unsound:
                return
            key = (node, tokens[i * self._size : (i + 1) * self._size])
            node = self._tree.get(key)
            if node is None:
                if page in self._by_page:  # below a page that was forgotten, where nobody finds it
                    del self._tree[self._by_page[page].key]
                node = self._tree[key] = self._by_page[page] = _Cached(key, page)
            elif (
                node.page != page
            ):  # another computed the same; what follows would hang on a page that is not the owner's
                return

    def forget(self, owner: str) -> None:
        """Lets nobody share the pages of `owner` any more, nor what follows them."""
        self._unsound.update(self._owned[owner])
        for page in self._owned[owner]:
            if (cached := self._by_page.pop(page, None)) is not None:
                del self._tree[cached.key]

    def give_back(self, owner: str) -> None:
        """Ends the ownership of all pages of `owner`.

        Raises:
          KeyError: the owner has none.
        """
        for page in reversed(self._owned.pop(owner)):
            self._owners[page] -= 1
            if self._owners[page]:
                continue
            del self._owners[page]
            self._unsound.discard(page)
            if page in self._by_page:
                self._idle[page] = None
            else:
                heapq.heappush(self._free, page)

    def _take_one(self) -> int:
        if self._free:
            return heapq.heappop(self._free)
        page, _ = self._idle.popitem(last=False)
        del self._tree[self._by_page.pop(page).key]
        return page
