"""The calls that answer at once, a function each: what they send, and what their answers mean."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar, Unpack

from google.protobuf.message import Message

from grok.serving.v1 import cluster_pb2, generation_pb2
from grokmesh.completions import (
    Completion,
    Options,
    ScoredText,
    ScoreOptions,
    completion_of,
    completion_request,
    scored,
)

Result = TypeVar("Result")
_GENERATION, _CLUSTER = "/grok.serving.v1.GenerationService/", "/grok.serving.v1.ClusterService/"


@dataclasses.dataclass(frozen=True)
class Call(Generic[Result]):
    """A request to a method.

    Attributes:
      path: of the method.
      request: that it gets.
      response: kind of message that it answers.
      result: what the caller gets of it.
    """

    path: str
    request: Message
    response: type[Message]
    result: Callable[[Any], Result]


def complete(prompt: str | Sequence[int], **options: Unpack[Options]) -> Call[Completion]:
    """A whole completion."""
    request = generation_pb2.GenerateOnceRequest(completion=completion_request(prompt, **options))
    return Call(f"{_GENERATION}GenerateOnce", request, generation_pb2.GenerateOnceResponse, completion_of)


def score(
    context: str | Sequence[int],
    continuations: Sequence[str | Sequence[int]] = (),
    **options: Unpack[ScoreOptions],
) -> Call[list[ScoredText]]:
    """The probabilities of given text."""
    scoring = generation_pb2.Scoring(**options)
    _give(scoring, context)
    for continuation in continuations:
        _give(scoring.continuations.add(), continuation)

    def result(response: generation_pb2.ScoreResponse) -> list[ScoredText]:
        return [ScoredText(text.first, scored(text.tokens)) for text in response.texts]

    request = generation_pb2.ScoreRequest(scoring=scoring)
    return Call(f"{_GENERATION}Score", request, generation_pb2.ScoreResponse, result)


def _give(message: generation_pb2.Scoring | generation_pb2.Continuation, text: str | Sequence[int]) -> None:
    if isinstance(text, str):
        message.text = text
    else:
        message.tokens.ids.extend(text)


def tokenize(text: str) -> Call[list[int]]:
    """The tokens of a text."""
    request = generation_pb2.TokenizeRequest(text=text)
    return Call(f"{_GENERATION}Tokenize", request, generation_pb2.TokenizeResponse, lambda response: list(response.ids))


def detokenize(ids: Sequence[int]) -> Call[str]:
    """The text of tokens."""
    request = generation_pb2.DetokenizeRequest(ids=ids)
    return Call(f"{_GENERATION}Detokenize", request, generation_pb2.DetokenizeResponse, lambda response: response.text)


def count_tokens(text: str) -> Call[int]:
    """The number of tokens of a text."""
    request = generation_pb2.CountTokensRequest(text=text)
    response = generation_pb2.CountTokensResponse
    return Call(f"{_GENERATION}CountTokens", request, response, lambda response: response.tokens)


def model() -> Call[generation_pb2.GetModelResponse]:
    """The served model."""
    request = generation_pb2.GetModelRequest()
    return Call(f"{_GENERATION}GetModel", request, generation_pb2.GetModelResponse, lambda response: response)


def cancel(request_id: str) -> Call[None]:
    """Ends a completion, wherever it runs."""
    request = generation_pb2.CancelRequest(request_id=request_id)
    return Call(f"{_GENERATION}Cancel", request, generation_pb2.CancelResponse, lambda _: None)


def load() -> Call[generation_pb2.GetLoadResponse]:
    """How busy the replicas are."""
    request = generation_pb2.GetLoadRequest()
    return Call(f"{_GENERATION}GetLoad", request, generation_pb2.GetLoadResponse, lambda response: response)


def status() -> Call[cluster_pb2.GetStatusResponse]:
    """Replicas, hosts and load."""
    request = cluster_pb2.GetStatusRequest()
    return Call(f"{_CLUSTER}GetStatus", request, cluster_pb2.GetStatusResponse, lambda response: response)


def restart(replica: int) -> Call[int]:
    """A replica gets new worker processes. Not tried again."""
    request = cluster_pb2.RestartRequest(replica=replica)
    return Call(f"{_CLUSTER}Restart", request, cluster_pb2.RestartResponse, lambda response: response.epoch)
