"""From a client's Scoring to completions of which nothing is drawn, and what comes of one."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence

from cluster.gateway.auth.api_keys import Caller
from cluster.gateway.errors import Violation, invalid
from cluster.gateway.session import Delta
from cluster.gateway.texts import Texts
from cluster.gateway.validation import Limits, check_answer_size, check_prompt
from grok.serving.v1 import generation_pb2

MAX_CONTINUATIONS = 64


async def to_completions(
    scoring: generation_pb2.Scoring, limits: Limits, texts: Texts, caller: Caller, *, whole: bool
) -> list[generation_pb2.Completion]:
    """A completion for each text that is scored. With `whole` they are answered at once. Raises GatewayError."""
    violations: list[Violation] = []

    def wrong(field: str, problem: str) -> None:
        violations.append(Violation(f"scoring.{field}", problem))

    def wrong_in(name: str, field: str, problem: str) -> None:
        wrong(f"{name}.{field}" if field else name, problem)

    check_prompt(scoring, "context", limits, wrong)
    if len(scoring.continuations) > MAX_CONTINUATIONS:
        wrong("continuations", f"has {len(scoring.continuations)} of them; at most {MAX_CONTINUATIONS}")
    for i, continuation in enumerate(scoring.continuations[:MAX_CONTINUATIONS]):
        name = f"continuations[{i}]"
        check_prompt(continuation, "", limits, functools.partial(wrong_in, name))
        if continuation.HasField("text") != scoring.HasField("text"):
            wrong(name, "must be text or tokens, as the context is")
    if violations:
        raise invalid(violations)

    async def tokens(text: str) -> Sequence[int]:
        return await texts.encode(text, caller)

    context = await tokens(scoring.text) if scoring.HasField("text") else scoring.tokens.ids
    scored = [(context, 0)] if not scoring.continuations else []
    for continuation in scoring.continuations:
        if continuation.HasField("tokens"):
            scored.append(([*context, *continuation.tokens.ids], len(context)))
        else:
            # What the two make together, where they meet, may be other tokens than those of the context by itself.
            both = await tokens(scoring.text + continuation.text)
            alike = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(context, both, strict=False))
            scored.append((both, sum(1 for _ in alike)))
    completions = []
    for ids, first in scored:
        completion = generation_pb2.Completion(
            max_tokens=0,
            score_from=scoring.score_from if scoring.HasField("score_from") else first,
            top_logprobs=scoring.top_logprobs,
            priority=scoring.priority,
            cache_salt=scoring.cache_salt,
        )
        completion.tokens.ids.extend(ids)
        completions.append(completion)
    if whole:
        count = sum(max(len(one.tokens.ids) - one.score_from, 0) for one in completions)
        check_answer_size("continuations", count, scoring.top_logprobs, limits, "call ScoreStream", wrong)
    if violations:
        raise invalid(violations)
    return completions


def scored_tokens(deltas: list[Delta]) -> list[generation_pb2.ScoredToken]:
    """The prompt's tokens of some deltas, with what became of them."""
    tokens = []
    for id, score in (one for delta in deltas for one in delta.scored):
        token = generation_pb2.ScoredToken(id=id)
        if score is not None:
            token.logprob, token.rank = score.logprob, score.rank
            token.top.extend(generation_pb2.TokenLogprob(id=other, logprob=logprob) for other, logprob in score.top)
        tokens.append(token)
    return tokens
