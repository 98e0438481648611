"""What may be cut, shared and guessed: as much as a mesh's kernels allow without changing a bit of any token."""

from __future__ import annotations

import dataclasses
import math
from typing import Protocol

from workers.messages.plan import EngineShape
from workers.messages.request import Request


class Policy(Protocol):
    """How sequences are computed."""

    @property
    def completions_shared(self) -> bool:
        """Whether the pages of completions may be shared with later prompts."""

    @property
    def drafts(self) -> bool:
        """Whether tokens may be guessed and verified."""

    def prefix(self, request: Request) -> tuple[int, ...]:
        """The tokens whose positions are computed before anything is sampled."""

    def forced(self, request: Request) -> tuple[int, ...]:
        """The tokens of a resumed request that are sampled again, though they are known."""

    def shared_pages(self, pages: tuple[int, ...]) -> tuple[int, ...]:
        """Those of a prefix's cached pages behind which its computation may begin."""

    def next_cut(self, positions: int) -> int:
        """The first place behind so many positions at which a computation may begin."""

    def chunk(self, budget: int, first: bool) -> int:
        """Positions that a chunk may have while so many are left of the budget, in the `first` call of a plan or a later one;
        none if less than 1."""


@dataclasses.dataclass(frozen=True)
class BatchInvariant:
    """A position's bits are the same wherever a prompt is cut and in whichever program it is computed: so prompts are cut
    anywhere, a resumed completion is computed like a prompt, completions are shared, and guesses are verified."""

    shape: EngineShape
    completions_shared: bool = True
    drafts: bool = True

    def prefix(self, request: Request) -> tuple[int, ...]:
        """Prompt and completion so far."""
        return (*request.context, *request.resumed)

    def forced(self, request: Request) -> tuple[int, ...]:
        """None."""
        del request
        return ()

    def shared_pages(self, pages: tuple[int, ...]) -> tuple[int, ...]:
        """All."""
        return pages

    def next_cut(self, positions: int) -> int:
        """The next page."""
        return positions + self.shape.page_size

    def chunk(self, budget: int, first: bool) -> int:
        """What is left of the budget."""
        del first
        return min(self.shape.chunk, budget)


@dataclasses.dataclass(frozen=True)
class ChunkAligned:
    """Bits depend on the program and on the cut: so prompts are cut at multiples of the chunk, and the tokens of a resumed
    completion are decoded one by one, as they were when they were sampled."""

    shape: EngineShape
    completions_shared: bool = False
    drafts: bool = False

    @property
    def _alignment(self) -> int:
        return math.lcm(self.shape.chunk, self.shape.page_size)

    def prefix(self, request: Request) -> tuple[int, ...]:
        """The prompt."""
        return request.context

    def forced(self, request: Request) -> tuple[int, ...]:
        """The completion so far."""
        return request.resumed

    def shared_pages(self, pages: tuple[int, ...]) -> tuple[int, ...]:
        """Those up to a cut."""
        aligned = self._alignment // self.shape.page_size
        return pages[: len(pages) // aligned * aligned]

    def next_cut(self, positions: int) -> int:
        """The next multiple of chunk and page."""
        return (positions // self._alignment + 1) * self._alignment

    def chunk(self, budget: int, first: bool) -> int:
        """A whole chunk or none."""
        return self.shape.chunk if first or budget >= self.shape.chunk else 0


def policy_for(shape: EngineShape) -> Policy:
    """The policy that an engine's kernels allow."""
    return BatchInvariant(shape) if shape.batch_invariant else ChunkAligned(shape)
