"""What the mesh is told to do next: the words between scheduler and runtime."""

from __future__ import annotations

import dataclasses

#: Number of most likely alternatives that are reported with each token.
ALTERNATIVES = 8


@dataclasses.dataclass(frozen=True)
class EngineShape:
    """The fixed sizes of the compiled programs.

    Attributes:
      slots: sequences that decode together; a multiple of `groups`.
      groups: parts into which a batch's rows are split over the mesh; slot s belongs to group s // (slots // groups),
        and its pages come from that group's pool.
      pages: pages of a group's pool, of which page 0 takes the writes of padding.
      page_size: positions of a page.
      chunk: prompt positions of one prefill call.
      context: longest sequence, prompt and completion together.
    """

    slots: int
    groups: int
    pages: int
    page_size: int
    chunk: int
    context: int

    def __post_init__(self) -> None:
        if self.slots % self.groups:
            raise ValueError(f"slots={self.slots} is not a multiple of the {self.groups} batch groups of the mesh")
        if self.pages < 2:
            raise ValueError(f"pages={self.pages}: needs one page for padding and at least one for sequences")

    @property
    def table_width(self) -> int:
        """Pages of the longest sequence."""
        return -(-self.context // self.page_size)

    def group_of(self, slot: int) -> int:
        """The group that a slot belongs to."""
        return slot // (self.slots // self.groups)

    def pages_for(self, positions: int) -> int:
        """Pages that `positions` cached positions take."""
        return -(-positions // self.page_size)


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How a request's tokens are drawn.

    Attributes:
      temperature: 0 takes the most likely token.
      top_p: in (0, 1]; 1 keeps all.
      top_k: 0 keeps all.
      seed: 64 bits; the draw at a position depends on it and the position alone.
      logit_bias: (token, value) pairs added to the logits.
      allowed_tokens: if there are any, all others are forbidden.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    logit_bias: tuple[tuple[int, float], ...] = ()
    allowed_tokens: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True)
class Admission:
    """A sequence takes a slot and its pages."""

    slot: int
    pages: tuple[int, ...]
    sampling: Sampling
    request_id: str = ""


@dataclasses.dataclass(frozen=True)
class Chunk:
    """Consecutive prompt positions of one slot, from `start` on. The last one draws the first token."""

    slot: int
    start: int
    tokens: tuple[int, ...]
    last: bool


@dataclasses.dataclass(frozen=True)
class Plan:
    """One step: admissions, then prefill calls (each at most one chunk a group), then one token for each slot of `decode`.

    Plans are carried out by all hosts in the order of their numbers.
    """

    number: int
    admissions: tuple[Admission, ...]
    prefills: tuple[tuple[Chunk, ...], ...]
    decode: tuple[int, ...]

    @property
    def prompt_tokens(self) -> int:
        """Prompt positions that it computes."""
        return sum(len(chunk.tokens) for chunks in self.prefills for chunk in chunks)


@dataclasses.dataclass(frozen=True)
class Token:
    """A sampled token with its logarithmic probability and the most likely alternatives."""

    id: int
    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclasses.dataclass(frozen=True)
class StepTokens:
    """What a plan came to.

    Attributes:
      number: of the plan.
      prefilled: one token for each last chunk, in the order of the plan.
      decoded: one token for each slot of `decode`.
      expert_tokens: for each group of layers, how many tokens each expert computed, summed over the layers.
    """

    number: int
    prefilled: tuple[Token, ...]
    decoded: tuple[Token, ...]
    expert_tokens: tuple[tuple[int, ...], ...] = ()
