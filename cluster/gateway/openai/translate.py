"""From OpenAI's requests to the service's own, and tokens as OpenAI shows them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from cluster.gateway.openai.schema import CompletionRequest, StreamOptions, StructuredOutputs, Tokens, _Request
from grok.serving.v1 import generation_pb2
from workers.text.tokenizer import Tokenizer

#: Where the logarithm of a probability is none that JSON knows.
IMPOSSIBLE = -9999.0
#: Tokens that are shown with their probabilities.
Shown = generation_pb2.GeneratedToken | generation_pb2.ScoredToken
_FINISHES = {
    generation_pb2.FINISH_REASON_EOS: "stop",
    generation_pb2.FINISH_REASON_STOP: "stop",
    generation_pb2.FINISH_REASON_LENGTH: "length",
}


def to_completion(request: _Request, prompt: str | Tokens, max_tokens: int | None, n: int) -> generation_pb2.Completion:
    """A completion of one prompt, without logprobs and chat's formats."""
    completion = generation_pb2.Completion(n=n)
    if isinstance(prompt, str):
        completion.text = prompt
    else:
        completion.tokens.ids.extend(prompt)
    sampling = completion.sampling
    if max_tokens is not None:
        completion.max_tokens = max_tokens
    for name in ("temperature", "top_p", "top_k", "seed", "min_p", "repetition_penalty"):
        if (value := getattr(request, name)) is not None:
            setattr(sampling, name, value)
    for name in ("presence_penalty", "frequency_penalty"):
        if value := getattr(request, name):
            setattr(sampling, name, value)
    for token, bias in (request.logit_bias or {}).items():
        sampling.logit_bias[int(token)] = bias
    sampling.allowed_tokens.extend(request.allowed_token_ids or ())
    completion.stop.extend([request.stop] if isinstance(request.stop, str) else request.stop or ())
    completion.include_stop_text = bool(request.include_stop_str_in_output)
    completion.stop_token_ids.extend(request.stop_token_ids or ())
    completion.ignore_eos = bool(request.ignore_eos)
    completion.min_tokens = request.min_tokens or 0
    completion.bad_words.extend(request.bad_words or ())
    completion.cache_salt = request.cache_salt or ""
    completion.priority = request.priority or 0
    options = request.stream_options
    completion.usage_in_parts = options is not None and bool(options.continuous_usage_stats)
    if request.structured_outputs is not None:
        _set_format(completion, request.structured_outputs)
    return completion


def _set_format(completion: generation_pb2.Completion, wanted: StructuredOutputs) -> None:
    if wanted.json_schema is not None:
        schema = wanted.json_schema
        completion.json_schema = schema if isinstance(schema, str) else json.dumps(schema)
    elif wanted.regex is not None:
        completion.regex = wanted.regex
    elif wanted.grammar is not None:
        completion.grammar = wanted.grammar
    elif wanted.json_object is not None:
        completion.json_object = True
    else:
        completion.choice.texts.extend(wanted.choice or ())


def prompts_of(request: CompletionRequest) -> list[str | Tokens]:
    """The prompts of a request, each to be completed by itself."""
    prompt = request.prompt
    if isinstance(prompt, str):
        return [prompt]
    if all(isinstance(part, int) for part in prompt):
        return [[part for part in prompt if isinstance(part, int)]]
    return [part for part in prompt if not isinstance(part, int)]


def finish_of(reason: generation_pb2.FinishReason.ValueType) -> str | None:
    """Why a completion has ended, None if it has not."""
    return _FINISHES.get(reason)


def usage_of(usages: Sequence[generation_pb2.Usage], n: int) -> dict[str, Any]:
    """What the completions of some prompts have used, `n` of each in a row: a prompt counts once."""
    prompt = sum(usage.prompt_tokens for usage in usages[::n])
    completion = sum(usage.completion_tokens for usage in usages)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": sum(usage.cached_prompt_tokens for usage in usages[::n])},
    }


def so_far(part: generation_pb2.GenerateResponse, options: StreamOptions | None) -> dict[str, Any]:
    """The usage of the completion that a part of a stream belongs to, where that is wanted."""
    wanted = options is not None and options.continuous_usage_stats
    return {"usage": usage_of([part.usage], 1)} if wanted else {}


class Spelling:
    """Tokens as texts."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def text(self, token: int) -> str:
        """The text of a token; of one that is no whole text, its bytes, as OpenAI writes them; of one without, its name."""
        spelled = self._tokenizer.spelled(token)
        if spelled is None:
            return self._tokenizer.piece(token)
        try:
            return spelled.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in spelled)

    def of_text(self, tokens: Sequence[Shown], offset: int) -> dict[str, Any]:
        """Probabilities as completions of text have them; the first token stands at `offset` of the text."""
        texts = [self.text(token.id) for token in tokens]
        offsets = [offset]
        for text in texts:
            offsets.append(offsets[-1] + len(text))
        return {
            "tokens": texts,
            "token_logprobs": [_finite(token.logprob) if _follows(token) else None for token in tokens],
            "top_logprobs": [
                {self.text(top.id): _finite(top.logprob) for top in token.top} if _follows(token) else None
                for token in tokens
            ],
            "text_offset": offsets[:-1],
        }

    def of_chat(self, tokens: Sequence[generation_pb2.GeneratedToken]) -> dict[str, Any]:
        """Probabilities as completions of chats have them."""

        def one(token: generation_pb2.GeneratedToken | generation_pb2.TokenLogprob) -> dict[str, Any]:
            spelled = self._tokenizer.spelled(token.id)
            return {
                "token": self.text(token.id),
                "logprob": _finite(token.logprob),
                "bytes": None if spelled is None else list(spelled),
            }

        return {"content": [{**one(token), "top_logprobs": [one(top) for top in token.top]} for token in tokens]}


def _follows(token: Shown) -> bool:
    """Whether a token has any before it."""
    return isinstance(token, generation_pb2.GeneratedToken) or token.HasField("logprob")


def _finite(logprob: float) -> float:
    return max(logprob, IMPOSSIBLE)
