"""What is asked of a completion, and what it is."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import TypedDict, Unpack

from grok.serving.v1 import generation_pb2


@dataclasses.dataclass(frozen=True)
class Token:
    """A token, its logarithmic probability under the model, and the likeliest tokens at its place with theirs."""

    id: int
    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclasses.dataclass(frozen=True)
class ScoredToken:
    """A token of given text: its logarithmic probability behind those before it, its place among all tokens by it, from 1, and
    the likeliest tokens there with theirs. A text's first token has none of that."""

    id: int
    logprob: float | None
    rank: int | None
    top: tuple[tuple[int, float], ...]


@dataclasses.dataclass(frozen=True)
class ScoredText:
    """Tokens of a text, from the `first` on, counted from 0."""

    first: int
    tokens: tuple[ScoredToken, ...]

    @property
    def logprob(self) -> float:
        """Of all tokens together."""
        return sum(token.logprob or 0.0 for token in self.tokens)

    @property
    def greedy(self) -> bool:
        """Whether each is the likeliest at its place."""
        return all(token.rank in (None, 1) for token in self.tokens)


@dataclasses.dataclass(frozen=True)
class Completion:
    """A completion, or a part of one.

    Attributes:
      request_id: names the request in the server's logs.
      text: of the tokens; in a part, what is new.
      tokens: in order; in a part, those that are new.
      finish_reason: `eos`, `stop` or `length`; None in all parts but the last.
      prompt_tokens: 0 in all parts but the last, unless `usage_in_parts` was asked for.
      cached_prompt_tokens: those of them that were not computed; 0 where `prompt_tokens` is.
      seed: with which the same request gives the same tokens.
      index: of the completion, where several were asked for.
      others: of a whole completion, the others that were asked for.
      prompt: the prompt's tokens that were scored, if that was asked for; in a part, those that are new.
    """

    request_id: str
    text: str
    tokens: tuple[Token, ...]
    finish_reason: str | None
    prompt_tokens: int
    seed: int
    index: int = 0
    others: tuple[Completion, ...] = ()
    cached_prompt_tokens: int = 0
    prompt: tuple[ScoredToken, ...] = ()


class Options(TypedDict, total=False):
    """How to complete; see `grok/serving/v1/generation.proto` for what each means, and for what is assumed if it is absent."""

    max_tokens: int
    temperature: float
    top_p: float
    top_k: int
    seed: int
    logit_bias: Mapping[int, float]
    allowed_tokens: Sequence[int]
    stop: Sequence[str]
    include_stop_text: bool
    stop_token_ids: Sequence[int]
    min_tokens: int
    ignore_eos: bool
    top_logprobs: int
    score_from: int
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    json_schema: str
    regex: str
    choice: Sequence[str]
    grammar: str
    json_object: bool
    structural_tags: Sequence[Mapping[str, str]]
    bad_words: Sequence[str]
    cache_salt: str
    usage_in_parts: bool
    n: int
    priority: int


class ScoreOptions(TypedDict, total=False):
    """How to score; see Options."""

    score_from: int
    top_logprobs: int
    priority: int
    cache_salt: str


def completion_request(prompt: str | Sequence[int], **options: Unpack[Options]) -> generation_pb2.Completion:
    """The request for a completion of a text or of tokens."""
    sampling = set(generation_pb2.SamplingParams.DESCRIPTOR.fields_by_name)
    given = {name: value for name, value in options.items() if name not in ("choice", "structural_tags")}
    parameters = {name: given.pop(name) for name in list(given) if name in sampling}
    completion = generation_pb2.Completion(sampling=generation_pb2.SamplingParams(**parameters), **given)  # type: ignore[arg-type]
    if "choice" in options:
        completion.choice.texts.extend(options["choice"])
    if "structural_tags" in options:
        tags = (generation_pb2.StructuralTag(**tag) for tag in options["structural_tags"])
        completion.structural_tags.tags.extend(tags)
    if isinstance(prompt, str):
        completion.text = prompt
    else:
        completion.tokens.CopyFrom(generation_pb2.TokenIds(ids=prompt))
    return completion


def completion_of(response: generation_pb2.GenerateResponse | generation_pb2.GenerateOnceResponse) -> Completion:
    """What a gateway has answered."""
    reason = None
    if response.finish_reason:
        reason = generation_pb2.FinishReason.Name(response.finish_reason).removeprefix("FINISH_REASON_").lower()
    return Completion(
        request_id=response.request_id,
        text=response.text,
        tokens=tuple(
            Token(token.id, token.logprob, tuple((top.id, top.logprob) for top in token.top))
            for token in response.tokens
        ),
        finish_reason=reason,
        prompt_tokens=response.usage.prompt_tokens,
        seed=response.seed,
        index=getattr(response, "index", 0),
        others=tuple(completion_of(other) for other in getattr(response, "others", ())),
        cached_prompt_tokens=response.usage.cached_prompt_tokens,
        prompt=scored(response.prompt),
    )


def scored(tokens: Iterable[generation_pb2.ScoredToken]) -> tuple[ScoredToken, ...]:
    """What a gateway has answered of given text."""
    return tuple(
        ScoredToken(
            token.id,
            token.logprob if token.HasField("logprob") else None,
            token.rank or None,
            tuple((top.id, top.logprob) for top in token.top),
        )
        for token in tokens
    )
