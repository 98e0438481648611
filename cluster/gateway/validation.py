"""From a client's Completion to an engine request: every wrong field is named, nothing is silently changed."""

from __future__ import annotations

import dataclasses
import math
import secrets
from collections.abc import Callable

from cluster.gateway.errors import Violation, invalid
from cluster.gateway.keys import MAX_PRIORITY
from grok.serving.v1 import generation_pb2
from workers.engine.plan import ALTERNATIVES, Sampling
from workers.engine.request import Request
from workers.grammar import MAX_SOURCE, GrammarError, Grammars, choice, json_schema, regex
from workers.model.config import GrokConfig
from workers.tokenizer import Tokenizer

_Wrong = Callable[[str, str], None]

MAX_STOP_TEXTS = 16
MAX_STOP_BYTES = 1024
MAX_BIASES = 1024
MAX_ALLOWED_TOKENS = 4096
MAX_TEMPERATURE = 100.0
MAX_BIAS = 100.0
MAX_REPETITION_PENALTY = 10.0
MAX_PENALTY = 2.0
MAX_COMPLETIONS = 16


@dataclasses.dataclass(frozen=True)
class Limits:
    """What requests are checked against.

    Attributes:
      model: that is served.
      context: longest sequence of the engine.
      grammars: over the model's tokens.
    """

    model: GrokConfig
    context: int
    grammars: Grammars


def to_request(completion: generation_pb2.Completion, limits: Limits, tokenizer: Tokenizer, request_id: str) -> Request:
    """The engine's request for a completion. Raises GatewayError (INVALID_ARGUMENT) with all violations."""
    violations: list[Violation] = []

    def wrong(field: str, problem: str) -> None:
        violations.append(Violation(f"completion.{field}", problem))

    prompt = _prompt(completion, limits, tokenizer, wrong)
    room = limits.context - len(prompt)
    max_tokens = completion.max_tokens if completion.HasField("max_tokens") else room
    if prompt and room < 1:
        wrong(
            completion.WhichOneof("prompt") or "prompt",
            f"the prompt has {len(prompt)} tokens; the context of {limits.context} leaves room for a completion "
            f"after at most {limits.context - 1}",
        )
    elif max_tokens < 1:
        wrong("max_tokens", f"is {max_tokens}; must be at least 1")
    elif prompt and max_tokens > room:
        wrong(
            "max_tokens",
            f"is {max_tokens}; with the prompt's {len(prompt)} tokens at most {room} fit the context "
            f"of {limits.context}",
        )
    if not 0 <= completion.top_logprobs <= ALTERNATIVES:
        wrong("top_logprobs", f"is {completion.top_logprobs}; must be from 0 to {ALTERNATIVES}")
    if len(completion.stop) > MAX_STOP_TEXTS:
        wrong("stop", f"has {len(completion.stop)} texts; at most {MAX_STOP_TEXTS}")
    for i, text in enumerate(completion.stop):
        if not 0 < len(text.encode()) <= MAX_STOP_BYTES:
            wrong(f"stop[{i}]", f"must have 1 to {MAX_STOP_BYTES} bytes")
    if not 0 <= completion.n <= MAX_COMPLETIONS:
        wrong("n", f"is {completion.n}; must be from 1 to {MAX_COMPLETIONS}")
    if abs(completion.priority) > MAX_PRIORITY:
        wrong("priority", f"is {completion.priority}; must be from -{MAX_PRIORITY} to {MAX_PRIORITY}")
    resumed = _resumed(completion, limits, max_tokens, wrong)
    grammar = _grammar(completion, limits, wrong)
    sampling = _sampling(completion.sampling, limits.model.vocab_size, bool(grammar), wrong)
    if violations:
        raise invalid(violations)
    stop_tokens = frozenset() if completion.ignore_eos else frozenset({limits.model.eos_token})
    return Request(request_id, tuple(prompt), max_tokens, sampling, stop_tokens, completion.priority, grammar, resumed)


def _prompt(completion: generation_pb2.Completion, limits: Limits, tokenizer: Tokenizer, wrong: _Wrong) -> list[int]:
    kind = completion.WhichOneof("prompt")
    if kind is None:
        wrong("prompt", "is missing; set text or tokens")
        return []
    if kind == "text":
        prompt = tokenizer.encode(completion.text)
        if not prompt:
            wrong("text", "is empty")
        return prompt
    prompt = list(completion.tokens.ids)
    if not prompt:
        wrong("tokens", "is empty")
    outside = [token for token in prompt if token >= limits.model.vocab_size]
    if outside:
        wrong("tokens", f"has token {outside[0]}; the vocabulary has {limits.model.vocab_size}")
    return prompt


def _resumed(completion: generation_pb2.Completion, limits: Limits, max_tokens: int, wrong: _Wrong) -> tuple[int, ...]:
    resumed = tuple(completion.resume.ids)
    if not resumed:
        return ()
    if completion.n > 1:
        wrong("resume", "can't be set together with n")
    if not completion.sampling.HasField("seed"):
        wrong("resume", "needs the seed that the responses told")
    if len(resumed) >= max_tokens:
        wrong("resume", f"has {len(resumed)} tokens; must be fewer than max_tokens={max_tokens}")
    vocab_size, eos = limits.model.vocab_size, limits.model.eos_token
    for token in resumed:
        if token >= vocab_size:
            wrong("resume", f"has token {token}; the vocabulary has {vocab_size}")
            break
        if token == eos and not completion.ignore_eos:
            wrong("resume", "has the end token: that completion is whole")
            break
    return resumed


def _grammar(completion: generation_pb2.Completion, limits: Limits, wrong: _Wrong) -> str:
    """The grammar of the format that is asked for; empty for none."""
    kind = completion.WhichOneof("format")
    if kind is None:
        return ""
    source = getattr(completion, kind)
    size = source.ByteSize() if isinstance(source, generation_pb2.Choice) else len(source.encode())
    if size > MAX_SOURCE:
        wrong(kind, f"is longer than {MAX_SOURCE} bytes")
        return ""
    if completion.ignore_eos:
        wrong("ignore_eos", f"can't be set together with {kind}, whose end is the model's end token")
    try:
        grammar = (
            json_schema(source) if kind == "json_schema" else regex(source) if kind == "regex" else choice(source.texts)
        )
        limits.grammars.check(grammar)
    except GrammarError as error:
        wrong(kind, str(error))
        return ""
    return grammar


def _sampling(params: generation_pb2.SamplingParams, vocab_size: int, masked: bool, wrong: _Wrong) -> Sampling:
    temperature = params.temperature if params.HasField("temperature") else 1.0
    if not 0 <= temperature <= MAX_TEMPERATURE:  # also false for NaN
        wrong("sampling.temperature", f"is {temperature}; must be a number from 0 to {MAX_TEMPERATURE:g}")
    top_p = params.top_p if params.HasField("top_p") else 1.0
    if not 0 < top_p <= 1:
        wrong("sampling.top_p", f"is {top_p:g}; must be more than 0 and at most 1")
    if params.top_k < 0:
        wrong("sampling.top_k", f"is {params.top_k}; must be at least 0")
    repetition = params.repetition_penalty if params.HasField("repetition_penalty") else 1.0
    if not 0 < repetition <= MAX_REPETITION_PENALTY:
        wrong(
            "sampling.repetition_penalty", f"is {repetition:g}; must be more than 0, at most {MAX_REPETITION_PENALTY:g}"
        )
    for field, value, least, greatest in (
        ("min_p", params.min_p, 0.0, 1.0),
        ("presence_penalty", params.presence_penalty, -MAX_PENALTY, MAX_PENALTY),
        ("frequency_penalty", params.frequency_penalty, -MAX_PENALTY, MAX_PENALTY),
    ):
        if not least <= value <= greatest:
            wrong(f"sampling.{field}", f"is {value:g}; must be from {least:g} to {greatest:g}")
    for field, entries, most in (
        ("logit_bias", params.logit_bias, MAX_BIASES),
        ("allowed_tokens", params.allowed_tokens, MAX_ALLOWED_TOKENS),
    ):
        if len(entries) > most:
            wrong(f"sampling.{field}", f"has {len(entries)} entries; at most {most}")
    for token, bias in params.logit_bias.items():
        if token >= vocab_size:
            wrong("sampling.logit_bias", f"has token {token}; the vocabulary has {vocab_size}")
        if not (math.isfinite(bias) and abs(bias) <= MAX_BIAS):
            wrong("sampling.logit_bias", f"is {bias} for token {token}; must be from -{MAX_BIAS:g} to {MAX_BIAS:g}")
    outside = [token for token in params.allowed_tokens if token >= vocab_size]
    if outside:
        wrong("sampling.allowed_tokens", f"has token {outside[0]}; the vocabulary has {vocab_size}")
    return Sampling(
        temperature=temperature,
        top_p=top_p,
        top_k=min(params.top_k, vocab_size),
        min_p=params.min_p,
        repetition_penalty=repetition,
        presence_penalty=params.presence_penalty,
        frequency_penalty=params.frequency_penalty,
        masked=masked,
        seed=params.seed if params.HasField("seed") else secrets.randbits(64),
        logit_bias=tuple(sorted(params.logit_bias.items())),
        allowed_tokens=tuple(sorted(set(params.allowed_tokens))),
    )
