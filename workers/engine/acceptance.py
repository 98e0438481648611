"""What an engine can compute at all."""

from __future__ import annotations

from workers.messages.plan import ALTERNATIVES, EngineShape
from workers.messages.request import Refused, Request


def pages_of(request: Request, shape: EngineShape) -> int:
    """Pages that a request has when it is whole. Its last token is never read back, so it needs no place in the cache."""
    return shape.pages_for(len(request.prompt) + request.max_tokens - 1)


def check_request(request: Request, shape: EngineShape, vocab_size: int) -> None:
    """Raises Refused if a request can never be served: it is too long, or not well formed."""
    prompt, sampling = len(request.prompt), request.sampling
    if prompt == 0:
        raise Refused("the prompt is empty")
    if request.score_from is not None and not 1 <= request.score_from <= prompt - (request.max_tokens == 0):
        raise Refused(f"score_from={request.score_from} is no token behind another one of the {prompt} of the prompt")
    if request.max_tokens < (1 if request.score_from is None else 0):
        raise Refused(f"max_tokens={request.max_tokens} must be at least 1")
    if len(request.resumed) >= max(request.max_tokens, 1):
        raise Refused(f"resumes after {len(request.resumed)} tokens of max_tokens={request.max_tokens}")
    if prompt + request.max_tokens > shape.context:
        raise Refused(
            f"{prompt} prompt tokens and max_tokens={request.max_tokens} exceed the context of {shape.context}"
        )
    if pages_of(request, shape) > shape.pages - 1:
        raise Refused(f"needs {pages_of(request, shape)} pages; the cache has {shape.pages - 1}")
    if not 0 <= sampling.top_k <= vocab_size:
        raise Refused(f"top_k={sampling.top_k} is outside the vocabulary of {vocab_size}")
    if not 0 <= sampling.top_logprobs <= ALTERNATIVES:
        raise Refused(f"top_logprobs={sampling.top_logprobs} must be from 0 to {ALTERNATIVES}")
    if not 0 <= sampling.seed < 2**64:
        raise Refused(f"seed={sampling.seed} must have 64 bits")
    biased = (token for token, _ in sampling.logit_bias)
    if not all(
        0 <= token < vocab_size for token in (*request.prompt, *request.resumed, *biased, *sampling.allowed_tokens)
    ):
        raise Refused(f"a token is outside the vocabulary of {vocab_size}")
