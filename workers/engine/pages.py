"""The owners of the KV cache's pages, and the pages that hold prefixes which others may share."""

from __future__ import annotations

import collections
import dataclasses
import heapq
from collections.abc import Collection, Mapping

from workers.engine.policy import Policy
from workers.messages.plan import EngineShape

Tokens = tuple[int, ...]


@dataclasses.dataclass(eq=False)
class _Cached:
    """A page whose tokens are known. What its key begins with holds the tokens before; the chain spells a prefix, and begins
    with a salt."""

    key: tuple[_Cached | str, Tokens]
    page: int


class PagePool:
    """Pages 1 to `pages - 1` of one group; page 0 belongs to padding and is never handed out.

    Full pages whose tokens are known form a tree of prefixes. They may be owned by several sequences, and stay behind without
    an owner until their space is needed: the longest unused go first. No sequence writes to a shared page, as a
    sequence computes only positions after the prefix that it shares.

    Pages are handed out lowest first, so that the same history always places sequences alike.
    """

    def __init__(self, pages: int, page_size: int) -> None:
        self._size, self._pages = page_size, pages
        self._free = list(range(1, pages))
        self._owned: dict[str, tuple[int, ...]] = {}
        self._owners: collections.Counter[int] = collections.Counter()
        self._tree: dict[tuple[_Cached | str, Tokens], _Cached] = {}
        self._by_page: dict[int, _Cached] = {}
        # Cached pages without owner, the longest unused first. A page is given back before the one that it follows, and
        # its owner owns that one too: so the first is never followed by another.
        self._idle: collections.OrderedDict[int, None] = collections.OrderedDict()
        # Of each owner, how many of its pages others may share, and the last of them.
        self._published: dict[str, tuple[int, _Cached]] = {}
        # Owned pages that may not be shared any more, nor what follows them.
        self._unsound: set[int] = set()

    @property
    def free(self) -> int:
        """Number of pages without an owner, cached ones included."""
        return len(self._free) + len(self._idle)

    @property
    def used(self) -> int:
        """Number of pages that are owned."""
        return len(self._owners)

    @property
    def cached(self) -> int:
        """Number of pages that hold a known prefix, owned or not."""
        return len(self._by_page)

    def match(self, tokens: Tokens, salt: str = "") -> tuple[int, ...]:
        """The pages of the longest prefix of `tokens` that is cached under a salt, full pages only."""
        pages: list[int] = []
        before: _Cached | str = salt
        for start in range(0, len(tokens) - self._size + 1, self._size):
            node = self._tree.get((before, tokens[start : start + self._size]))
            if node is None:
                break
            pages.append(node.page)
            before = node
        return tuple(pages)

    def can_take(self, shared: tuple[int, ...], count: int) -> bool:
        """Whether `take` would find its pages."""
        return count <= self.free - sum(page in self._idle for page in shared)

    def take(self, owner: str, shared: tuple[int, ...], count: int) -> tuple[int, ...]:
        """Hands the cached pages `shared` and `count` others to `owner`, which must have none.

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

    def publish(self, owner: str, tokens: Tokens, count: int, salt: str = "") -> None:
        """Lets others of the same salt share the pages of `owner` that are full of the first `count` of `tokens`, its whole
        sequence."""
        first, before = self._published.get(owner) or (0, salt)
        for i in range(first, count // self._size):
            page, key = self._owned[owner][i], (before, tokens[i * self._size : (i + 1) * self._size])
            if page in self._unsound:
                return
            node = self._tree.get(key)
            if node is None:
                if page in self._by_page:  # below a page that was forgotten, where `match` does not find it
                    del self._tree[self._by_page[page].key]
                node = self._tree[key] = self._by_page[page] = _Cached(key, page)
            elif node.page != page:
                return  # another computed the same; what follows would hang on a page that is not the owner's
            self._published[owner] = i + 1, node
            before = node

    def forget(self, owner: str) -> None:
        """Takes the pages of `owner`, and what follows them, out of what may be shared."""
        forgotten = self._owned[owner]
        self._unsound.update(forgotten)
        for other, pages in self._owned.items():
            if not self._unsound.isdisjoint(pages):
                self._published.pop(other, None)
        for page in forgotten:
            if (cached := self._by_page.pop(page, None)) is not None:
                del self._tree[cached.key]

    def give_back(self, owner: str) -> None:
        """Ends the ownership of all pages of `owner`.

        Raises:
          KeyError: the owner has none.
        """
        self._published.pop(owner, None)
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

    def check_integrity(self, owners: Collection[str]) -> None:
        """Raises AssertionError unless each page is free, or idle, or belongs to those of `owners` that may share it."""
        assert set(self._owned) == set(owners), f"{set(self._owned) ^ set(owners)} have pages or should have"
        owned = collections.Counter(page for pages in self._owned.values() for page in pages)
        assert owned == self._owners
        assert 0 not in owned
        held = [*owned, *self._free, *self._idle]
        assert len(held) == len(set(held)), "a page is owned, free or idle, and no two of them"
        assert set(held) == set(range(1, self._pages))
        assert self._by_page.keys() <= owned.keys() | self._idle.keys()
        for page, count in owned.items():
            assert count == 1 or page in self._by_page or page in self._unsound, "a page of two that is no known prefix"

    def _take_one(self) -> int:
        if self._free:
            return heapq.heappop(self._free)
        page, _ = self._idle.popitem(last=False)
        del self._tree[self._by_page.pop(page).key]
        return page


@dataclasses.dataclass(frozen=True)
class Place:
    """A slot for a sequence, and the cached pages of its prefix that it shares, which hold `cached` positions."""

    slot: int
    shared: tuple[int, ...]
    cached: int


class PageGroups:
    """The slots of an engine and the pools of their groups."""

    def __init__(self, shape: EngineShape) -> None:
        self._shape = shape
        self._pools = [PagePool(shape.pages, shape.page_size) for _ in range(shape.groups)]
        self._free_slots = set(range(shape.slots))

    @property
    def free_slots(self) -> int:
        """Number of slots that no sequence has."""
        return len(self._free_slots)

    @property
    def total(self) -> int:
        """Number of all pages that sequences may have."""
        return (self._shape.pages - 1) * self._shape.groups

    @property
    def used(self) -> int:
        """Number of pages that are owned."""
        return sum(pool.used for pool in self._pools)

    @property
    def cached(self) -> int:
        """Number of pages that hold a known prefix, owned or not."""
        return sum(pool.cached for pool in self._pools)

    def pool(self, slot: int) -> PagePool:
        """The pool that a slot's pages come from."""
        return self._pools[self._shape.group_of(slot)]

    def place(self, policy: Policy, reusable: Tokens, pages: int, salt: str = "") -> Place | None:
        """The lowest free slot of the group that has most of `reusable` cached under a salt, then the most free pages, if there
        are `pages`."""
        groups = {self._shape.group_of(slot) for slot in self._free_slots}
        shared = {group: policy.shared_pages(self._pools[group].match(reusable, salt)) for group in groups}
        # A page for each that runs, lest the next of them to grow preempts the newcomer at once.
        taken = set(range(self._shape.slots)) - self._free_slots
        growing = collections.Counter(map(self._shape.group_of, taken))
        roomy = [g for g in groups if self._pools[g].can_take(shared[g], pages - len(shared[g]) + growing[g])]
        if not roomy:
            return None
        best = max(roomy, key=lambda group: (len(shared[group]), self._pools[group].free, -group))
        slot = min(slot for slot in self._free_slots if self._shape.group_of(slot) == best)
        return Place(slot, shared[best], len(shared[best]) * self._shape.page_size)

    def take(self, owner: str, place: Place, pages: int) -> tuple[int, ...]:
        """Gives a place and `pages` pages in all to an owner, which must have none."""
        self._free_slots.remove(place.slot)
        return self.pool(place.slot).take(owner, place.shared, pages - len(place.shared))

    def give_back(self, owner: str, slot: int) -> None:
        """Ends the ownership of a slot and of all pages of an owner."""
        self._free_slots.add(slot)
        self.pool(slot).give_back(owner)

    def check_integrity(self, slots: Mapping[str, int]) -> None:
        """Raises AssertionError unless all slots and pages are free or belong to these owners, whose `slots` are given."""
        assert len(set(slots.values())) == len(slots), "a slot of two"
        assert set(slots.values()) | self._free_slots == set(range(self._shape.slots))
        assert not set(slots.values()) & self._free_slots
        for group, pool in enumerate(self._pools):
            pool.check_integrity([owner for owner, slot in slots.items() if self._shape.group_of(slot) == group])
