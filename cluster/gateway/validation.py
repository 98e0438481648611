"""From a client's Completion to an engine request: every wrong field is named, nothing is silently changed."""

from __future__ import annotations

import dataclasses
import secrets
from collections.abc import Callable, Sequence

from cluster.gateway.auth.api_keys import MAX_PRIORITY, Caller
from cluster.gateway.errors import Violation, invalid
from cluster.gateway.texts import Texts
from grok.serving.v1 import generation_pb2
from workers.messages.plan import ALTERNATIVES, Sampling
from workers.messages.request import Request
from workers.model.config import GrokConfig
from workers.text.grammar import MAX_SOURCE, GrammarError

_Wrong = Callable[[str, str], None]

MAX_STOP_TEXTS = 16
MAX_STOP_BYTES = 1024
MAX_STOP_TOKENS = 64
MAX_BAD_WORDS = 16
MAX_BAD_WORD_BYTES = 256
MAX_SALT_BYTES = 256
MAX_BIASES = 1024
MAX_ALLOWED_TOKENS = 4096
MAX_TEMPERATURE = 100.0
MAX_BIAS = 100.0
MAX_REPETITION_PENALTY = 10.0
MAX_PENALTY = 2.0
MAX_COMPLETIONS = 16
#: Most bytes of a whole answer: what gRPC's clients take by default, less a reserve.
MAX_ANSWER_BYTES = 4 * 1024 * 1024 - 64 * 1024
#: Bytes of a token in an answer and of each alternative to it: fields' heads, an id of up to three bytes, a float.
_TOKEN_BYTES, _ALTERNATIVE_BYTES = 13, 11


@dataclasses.dataclass(frozen=True)
class Limits:
    """What requests are checked against.

    Attributes:
      model: that is served.
      context: longest sequence of the engine.
      longest_piece: bytes of the longest text that a token stands for.
      share_prefixes: whether one key's requests find what the prefix cache keeps of another's.
    """

    model: GrokConfig
    context: int
    longest_piece: int
    share_prefixes: bool = False

    @property
    def text_bytes(self) -> int:
        """Bytes beyond which no prompt fits the context."""
        return self.context * self.longest_piece

    @property
    def message_bytes(self) -> int:
        """Bytes beyond which no request for a completion can be right."""
        ids = 5 * (2 * self.context + MAX_ALLOWED_TOKENS) + 16 * MAX_BIASES
        texts = MAX_STOP_TEXTS * (MAX_STOP_BYTES + 8) + MAX_BAD_WORDS * (MAX_BAD_WORD_BYTES + 8) + MAX_SALT_BYTES
        return max(self.text_bytes, 5 * self.context) + ids + 2 * MAX_SOURCE + texts


async def to_request(
    completion: generation_pb2.Completion,
    limits: Limits,
    texts: Texts,
    caller: Caller,
    request_id: str,
    *,
    whole: bool,
    within: str = "completion.",
) -> Request:
    """The engine's request for a completion. What would take long is only looked at when all else is right.

    Args:
      completion: the completion.
      limits: that it must keep.
      texts: work on its texts.
      caller: whose key it is.
      request_id: names it.
      whole: whether it is answered at once, so that the answer must not be too large.
      within: stands before the names of fields in violations.

    Raises:
      GatewayError: INVALID_ARGUMENT with all violations, or RESOURCE_EXHAUSTED.
    """
    violations: list[Violation] = []

    def wrong(field: str, problem: str) -> None:
        violations.append(Violation(f"{within}{field}", problem))

    check_prompt(completion, "prompt", limits, wrong)
    if completion.HasField("max_tokens") and completion.max_tokens < (0 if completion.HasField("score_from") else 1):
        wrong("max_tokens", f"is {completion.max_tokens}; must be at least 1, or 0 with score_from")
    if completion.HasField("max_tokens") and completion.max_tokens == 0 and completion.n > 1:
        wrong("n", f"is {completion.n}; there is one completion of which nothing is drawn")
    if not 0 <= completion.top_logprobs <= ALTERNATIVES:
        wrong("top_logprobs", f"is {completion.top_logprobs}; must be from 0 to {ALTERNATIVES}")
    _check_texts("stop", completion.stop, MAX_STOP_TEXTS, MAX_STOP_BYTES, wrong)
    _check_stop_tokens(completion, limits, wrong)
    if not 0 <= completion.n <= MAX_COMPLETIONS:
        wrong("n", f"is {completion.n}; must be from 1 to {MAX_COMPLETIONS}")
    if abs(completion.priority) > MAX_PRIORITY:
        wrong("priority", f"is {completion.priority}; must be from -{MAX_PRIORITY} to {MAX_PRIORITY}")
    elif completion.priority > caller.max_priority:
        wrong("priority", f"is {completion.priority}; this key may ask for at most {caller.max_priority}")
    _check_resumed(completion, limits, wrong)
    _check_format(completion, wrong)
    _check_texts("bad_words", completion.bad_words, MAX_BAD_WORDS, MAX_BAD_WORD_BYTES, wrong)
    if len(completion.cache_salt.encode()) > MAX_SALT_BYTES:
        wrong("cache_salt", f"has more than {MAX_SALT_BYTES} bytes")
    _check_sampling(completion.sampling, limits.model.vocab_size, wrong)
    if violations:
        raise invalid(violations)
    kind = completion.WhichOneof("prompt")
    prompt = completion.tokens.ids if kind == "tokens" else await texts.encode(completion.text, caller)
    max_tokens = _check_length(completion, len(prompt), limits, wrong)
    if whole:
        _check_answer(completion, len(prompt), max_tokens, limits, wrong)
    if violations:
        raise invalid(violations)
    grammar = await _grammar(completion, texts, caller)
    sampling = _sampling(completion, limits.model, masked=bool(grammar))
    stop_tokens = _stop_tokens(completion, limits.model)
    if completion.min_tokens and stop_tokens:
        sampling = dataclasses.replace(sampling, masked=True)
    resumed = tuple(completion.resume.ids)
    least = completion.min_tokens if stop_tokens else 0
    scored = max(completion.score_from, 1) if completion.HasField("score_from") else len(prompt)
    return Request(
        request_id,
        tuple(prompt),
        max_tokens,
        sampling,
        stop_tokens,
        least,
        completion.priority,
        grammar,
        resumed,
        score_from=scored if scored < len(prompt) else None,
        salt=f"{'' if limits.share_prefixes else caller.name}\n{completion.cache_salt}",
    )


def check_prompt(
    given: generation_pb2.Completion | generation_pb2.Scoring | generation_pb2.Continuation,
    name: str,
    limits: Limits,
    wrong: Callable[[str, str], None],
) -> None:
    """Looks at a text, or tokens, that are missing as `name`; `wrong` gets the field and what is wrong with it."""
    if given.HasField("text"):
        size = len(given.text.encode())
        if not size:
            wrong("text", "is empty")
        elif size > limits.text_bytes:
            wrong("text", f"has {size} bytes; the context of {limits.context} tokens holds at most {limits.text_bytes}")
    elif not given.HasField("tokens"):
        wrong(name, "is missing; set text or tokens")
    elif not given.tokens.ids:
        wrong("tokens", "is empty")
    elif len(given.tokens.ids) <= limits.context:  # more do not fit: that is another violation
        _check_ids("tokens", given.tokens.ids, limits.model.vocab_size, wrong)


def _check_ids(field: str, ids: Sequence[int], vocab_size: int, wrong: _Wrong) -> None:
    outside = next((token for token in ids if token >= vocab_size), None)
    if outside is not None:
        wrong(field, f"has token {outside}; the vocabulary has {vocab_size}")


def _most_tokens(completion: generation_pb2.Completion, limits: Limits) -> int:
    """What `max_tokens` comes to before the prompt's length is known."""
    return completion.max_tokens if completion.HasField("max_tokens") else limits.context


def _stop_tokens(completion: generation_pb2.Completion, model: GrokConfig) -> frozenset[int]:
    return frozenset([*completion.stop_token_ids, *(() if completion.ignore_eos else (model.eos_token,))])


def _check_texts(field: str, texts: Sequence[str], most: int, most_bytes: int, wrong: _Wrong) -> None:
    if len(texts) > most:
        wrong(field, f"has {len(texts)} texts; at most {most}")
        return
    for i, text in enumerate(texts):
        if not 0 < len(text.encode()) <= most_bytes:
            wrong(f"{field}[{i}]", f"must have 1 to {most_bytes} bytes")


def _check_stop_tokens(completion: generation_pb2.Completion, limits: Limits, wrong: _Wrong) -> None:
    if len(completion.stop_token_ids) > MAX_STOP_TOKENS:
        wrong("stop_token_ids", f"has {len(completion.stop_token_ids)} tokens; at most {MAX_STOP_TOKENS}")
    else:
        _check_ids("stop_token_ids", completion.stop_token_ids, limits.model.vocab_size, wrong)
    most = _most_tokens(completion, limits)
    allowed = completion.sampling.allowed_tokens
    if not 0 <= completion.min_tokens <= max(most, 0):
        wrong("min_tokens", f"is {completion.min_tokens}; must be from 0 to max_tokens={most}")
    elif completion.min_tokens and allowed and _stop_tokens(completion, limits.model).issuperset(allowed):
        wrong("min_tokens", "can't be kept: all of sampling.allowed_tokens end the completion")


def _check_resumed(completion: generation_pb2.Completion, limits: Limits, wrong: _Wrong) -> None:
    resumed = completion.resume.ids
    if not resumed:
        return
    if completion.n > 1:
        wrong("resume", "can't be set together with n")
    if not completion.sampling.HasField("seed"):
        wrong("resume", "needs the seed that the responses carried")
    most = _most_tokens(completion, limits)
    if len(resumed) >= min(most, limits.context):
        wrong("resume", f"has {len(resumed)} tokens; must be fewer than max_tokens={most}")
        return
    _check_ids("resume", resumed, limits.model.vocab_size, wrong)
    if not _stop_tokens(completion, limits.model).isdisjoint(resumed):
        wrong("resume", "has a token that ends it: that completion is whole")


def _check_format(completion: generation_pb2.Completion, wrong: _Wrong) -> None:
    kind = completion.WhichOneof("format")
    if kind is None:
        return
    source = getattr(completion, kind)
    if source is False:
        wrong(kind, "is false; leave it out for any text")
        return
    size = len(source.encode()) if isinstance(source, str) else 0 if source is True else source.ByteSize()
    if size > MAX_SOURCE:
        wrong(kind, f"is longer than {MAX_SOURCE} bytes")
    if completion.ignore_eos:
        wrong("ignore_eos", f"can't be set together with {kind}, whose end is the model's end token")


def _check_length(completion: generation_pb2.Completion, prompt: int, limits: Limits, wrong: _Wrong) -> int:
    """Most tokens to draw after a prompt of so many."""
    room = limits.context - prompt
    max_tokens = completion.max_tokens if completion.HasField("max_tokens") else max(room, 1)
    if prompt == 0:
        wrong("text", "has no tokens")
    elif max_tokens == 0 and max(completion.score_from, 1) >= prompt:
        wrong("score_from", f"is {completion.score_from}; the prompt has {prompt} tokens, and none is to be drawn")
    elif room < min(max_tokens, 1):
        wrong(
            completion.WhichOneof("prompt") or "prompt",
            f"the prompt has {prompt} tokens; the context of {limits.context} leaves room for a completion "
            f"after at most {limits.context - 1}",
        )
    elif max_tokens > room:
        wrong(
            "max_tokens",
            f"is {max_tokens}; with the prompt's {prompt} tokens at most {room} fit the context of {limits.context}",
        )
    if len(completion.resume.ids) >= max_tokens > 0:
        wrong("resume", f"has {len(completion.resume.ids)} tokens; must be fewer than max_tokens={max_tokens}")
    return max_tokens


def _check_answer(
    completion: generation_pb2.Completion, prompt: int, max_tokens: int, limits: Limits, wrong: _Wrong
) -> None:
    scored = max(prompt - completion.score_from, 0) if completion.HasField("score_from") else 0
    tokens = max(1, completion.n) * max_tokens + scored
    check_answer_size("max_tokens", tokens, completion.top_logprobs, limits, "call Generate", wrong)


def check_answer_size(
    field: str, tokens: int, top_logprobs: int, limits: Limits, instead: str, wrong: Callable[[str, str], None]
) -> None:
    """Looks at how large an answer of so many tokens may be; `instead` says which call streams it."""
    size = tokens * (limits.longest_piece + _TOKEN_BYTES + top_logprobs * _ALTERNATIVE_BYTES)
    if size > MAX_ANSWER_BYTES:
        wrong(
            field,
            f"of {tokens} tokens in all may make an answer of {size} bytes, more than {MAX_ANSWER_BYTES}; ask for fewer "
            f"tokens, completions or logprobs, or {instead}, which streams",
        )


async def _grammar(completion: generation_pb2.Completion, texts: Texts, caller: Caller) -> str:
    """The grammar of the format that is asked for; empty for none. Raises GatewayError."""
    kind = completion.WhichOneof("format")
    if kind is None and not completion.bad_words:
        return ""
    source = None if kind is None else getattr(completion, kind)
    if isinstance(source, generation_pb2.Choice):
        source = list(source.texts)
    elif isinstance(source, generation_pb2.StructuralTags):
        names = [field.name for field in generation_pb2.StructuralTag.DESCRIPTOR.fields]
        source = [{name: getattr(tag, name) for name in names} for tag in source.tags]
    try:
        return await texts.grammar(kind, source, completion.sampling.allowed_tokens, completion.bad_words, caller)
    except GrammarError as error:
        raise invalid([Violation(f"completion.{kind or 'bad_words'}", str(error))]) from error


def _check_sampling(params: generation_pb2.SamplingParams, vocab_size: int, wrong: _Wrong) -> None:
    temperature = params.temperature
    if not 0 <= temperature <= MAX_TEMPERATURE:  # also false for NaN
        wrong("sampling.temperature", f"is {temperature}; must be a number from 0 to {MAX_TEMPERATURE:g}")
    if params.HasField("top_p") and not 0 < params.top_p <= 1:
        wrong("sampling.top_p", f"is {params.top_p:g}; must be more than 0 and at most 1")
    if params.top_k < 0:
        wrong("sampling.top_k", f"is {params.top_k}; must be at least 0")
    repetition = params.repetition_penalty
    if params.HasField("repetition_penalty") and not 0 < repetition <= MAX_REPETITION_PENALTY:
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
    if len(params.logit_bias) > MAX_BIASES:
        wrong("sampling.logit_bias", f"has {len(params.logit_bias)} entries; at most {MAX_BIASES}")
    else:
        _check_ids("sampling.logit_bias", sorted(params.logit_bias), vocab_size, wrong)
        extreme = next((i for i in params.logit_bias.items() if not abs(i[1]) <= MAX_BIAS), None)  # also for NaN
        if extreme is not None:
            token, bias = extreme
            wrong("sampling.logit_bias", f"is {bias} for token {token}; must be from -{MAX_BIAS:g} to {MAX_BIAS:g}")
    if len(params.allowed_tokens) > MAX_ALLOWED_TOKENS:
        wrong("sampling.allowed_tokens", f"has {len(params.allowed_tokens)} entries; at most {MAX_ALLOWED_TOKENS}")
    else:
        _check_ids("sampling.allowed_tokens", params.allowed_tokens, vocab_size, wrong)


def _sampling(completion: generation_pb2.Completion, model: GrokConfig, *, masked: bool) -> Sampling:
    """How tokens are sampled; `masked` by a grammar. The end of a format is never forbidden."""
    params, ends = completion.sampling, completion.WhichOneof("format") is not None
    allowed = set(params.allowed_tokens)
    return Sampling(
        temperature=params.temperature if params.HasField("temperature") else 1.0,
        top_p=params.top_p if params.HasField("top_p") else 1.0,
        top_k=min(params.top_k, model.vocab_size),
        min_p=params.min_p,
        repetition_penalty=params.repetition_penalty if params.HasField("repetition_penalty") else 1.0,
        presence_penalty=params.presence_penalty,
        frequency_penalty=params.frequency_penalty,
        masked=masked,
        top_logprobs=completion.top_logprobs,
        seed=params.seed if params.HasField("seed") else secrets.randbits(64),
        logit_bias=tuple(sorted(params.logit_bias.items())),
        allowed_tokens=tuple(sorted(allowed | {model.eos_token} if allowed and ends else allowed)),
    )
