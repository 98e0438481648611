"""What the mesh does next: the messages from scheduler to runtime, and back."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

#: Most alternatives that may be reported with a token.
ALTERNATIVES = 8

#: Positions of a chunk that are scored at a time.
SCORED_ROWS = 64
#: Tokens that a draft may guess beyond the one that is known.
MAX_DRAFT = 3
#: Most slots of a plan with drafts.
MAX_VERIFIED = 4


@dataclasses.dataclass(frozen=True)
class EngineShape:
    """The fixed sizes of the compiled programs.

    Attributes:
      slots: sequences that decode together; a multiple of `groups`.
      groups: parts into which a batch's rows are split over the mesh; slot s belongs to group s // (slots // groups),
        and its pages come from that group's pool.
      pages: pages of a group's pool, of which page 0 takes the writes of padding.
      page_size: positions of a page.
      chunk: most prompt positions of one prefill call.
      context: longest sequence, prompt and completion together.
      batch_invariant: whether a position's bits are the same wherever a prompt is cut and in whichever program it is computed.
        If not, prompts are cut at multiples of `chunk` only, completions are not cached, and nothing is drafted.
    """

    slots: int
    groups: int
    pages: int
    page_size: int
    chunk: int
    context: int
    batch_invariant: bool = False

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
    """How a request's tokens are sampled.

    Attributes:
      temperature: 0 takes the most likely token.
      top_p: in (0, 1]; 1 keeps all.
      top_k: 0 keeps all.
      min_p: in [0, 1]: tokens below this part of the most likely one's probability are dropped; 0 keeps all.
      seed: 64 bits; the draw at a position depends on it and the position alone.
      logit_bias: (token, value) pairs added to the logits.
      allowed_tokens: if there are any, all others are forbidden.
      repetition_penalty: divides positive and multiplies negative logits of tokens seen in prompt or completion; 1 for none.
      presence_penalty, frequency_penalty: taken from the logits of generated tokens, once and for each time.
      masked: whether plans bring masks of the tokens that may come next.
      top_logprobs: most likely alternatives that are reported with each token, up to ALTERNATIVES.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int = 0
    logit_bias: tuple[tuple[int, float], ...] = ()
    allowed_tokens: tuple[int, ...] = ()
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    masked: bool = False
    top_logprobs: int = 0

    @property
    def biased(self) -> bool:
        """Whether a bias is added to the logits."""
        return bool(self.logit_bias or self.allowed_tokens)

    @property
    def penalized(self) -> bool:
        """Whether the draw depends on the tokens before."""
        return self.repetition_penalty != 1.0 or self.presence_penalty != 0.0 or self.frequency_penalty != 0.0


@dataclasses.dataclass(frozen=True)
class SlotStart:
    """A sequence takes a slot and its pages. `prompt` is set where penalties need to know it, and so is `generated`, the
    completion so far, if the sequence is resumed."""

    slot: int
    pages: tuple[int, ...]
    sampling: Sampling
    request_id: str = ""
    prompt: tuple[int, ...] = ()
    generated: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True)
class PageGrant:
    """A slot gets more pages, of which the first is its page number `first`."""

    slot: int
    first: int
    pages: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Mask:
    """The tokens that a slot may draw next: bit t % 32 of word t // 32, little endian, 4 bytes a word."""

    slot: int
    words: bytes


@dataclasses.dataclass(frozen=True)
class Forced:
    """The token that a slot draws next, whatever the logits say: one that was generated before, on a mesh that is gone."""

    slot: int
    token: int


@dataclasses.dataclass(frozen=True)
class Chunk:
    """Consecutive prompt positions of one slot, from `start` on. The last one draws the first token. `scored` has, for each
    position, the token behind it whose probability is wanted, -1 for none; it is empty if there is none at all."""

    slot: int
    start: int
    tokens: tuple[int, ...]
    last: bool
    scored: tuple[int, ...] = ()


class DecodeRow(NamedTuple):
    """A slot that samples the token after its last one, which stands at `position`."""

    slot: int
    position: int


@dataclasses.dataclass(frozen=True)
class Draft:
    """A slot's last token, at `position`, and guesses of those that follow. Right guesses become tokens in one step."""

    slot: int
    position: int
    tokens: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Plan:
    """One step: page grants, starts, masks and forced tokens, then prefill calls (each at most one chunk a group), then `steps`
    tokens for each row of `decode` and what is right of each of `drafts`, whose slots are others. Where there are drafts, both
    together are at most MAX_VERIFIED.

    Plans are carried out by all hosts in the order of their numbers.
    """

    number: int
    starts: tuple[SlotStart, ...]
    prefills: tuple[tuple[Chunk, ...], ...]
    decode: tuple[DecodeRow, ...]
    masks: tuple[Mask, ...] = ()
    drafts: tuple[Draft, ...] = ()
    steps: int = 1
    grants: tuple[PageGrant, ...] = ()
    forced: tuple[Forced, ...] = ()

    @property
    def prompt_tokens(self) -> int:
        """Prompt positions that it computes."""
        return sum(len(chunk.tokens) for chunks in self.prefills for chunk in chunks)

    @property
    def decode_rows(self) -> int:
        """Positions that its decode calls compute."""
        return len(self.decode) * self.steps + sum(len(draft.tokens) for draft in self.drafts)


@dataclasses.dataclass(frozen=True)
class Token:
    """A sampled token with its logarithmic probability, and as many of the most likely alternatives as its request asks for."""

    id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclasses.dataclass(frozen=True)
class Score:
    """What the model makes of a prompt's token: its logarithmic probability behind those before, its place among all tokens,
    from 1 on, and as many of the most likely tokens as its request asks for."""

    logprob: float
    rank: int
    top: tuple[tuple[int, float], ...] = ()


@dataclasses.dataclass(frozen=True)
class StepTokens:
    """What a plan came to.

    Attributes:
      number: of the plan.
      prefilled: one token for each last chunk, in the order of the plan.
      decoded: `steps` tokens for each row of `decode`.
      drafted: for each draft, the right guesses and the token after them.
      expert_tokens: for each group of layers, how many tokens each expert computed, summed over the layers.
      scored: of each chunk with `scored` tokens, in the order of the plan, what became of these.
    """

    number: int
    prefilled: tuple[Token, ...]
    decoded: tuple[tuple[Token, ...], ...]
    drafted: tuple[tuple[Token, ...], ...] = ()
    expert_tokens: tuple[tuple[int, ...], ...] = ()
    scored: tuple[tuple[Score, ...], ...] = ()
