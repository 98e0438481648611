"""Given text and its probabilities: what is asked of the engine, and how it comes back."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import grpc
import pytest

from cluster.gateway.auth.api_keys import ANONYMOUS
from cluster.gateway.errors import GatewayError
from cluster.gateway.scoring import scored_tokens, to_completions
from cluster.gateway.session import Session
from cluster.gateway.stop import StopTexts
from cluster.gateway.validation import Limits
from grok.serving.v1 import generation_pb2, generation_pb2_grpc
from grokmesh import Client, ScoredToken
from tests.support.fake_service import MODEL, TOKENIZER, InlineTexts, now, serving
from workers.messages.plan import Sampling, Score, Token
from workers.messages.request import Request, ScoreEvent, TokenEvent

LIMITS, TEXTS = Limits(MODEL, 64, TOKENIZER.longest_piece), InlineTexts()
TEXT = "And it came to pass in those days"
#: What the fake mesh says of each token that follows another.
SCORE = (-2.0, 3)


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with serving() as (address, _):
        yield address


@pytest.fixture
def client(address: str) -> Iterator[Client]:
    with Client(address) as client:
        yield client


def _tokens(*ids: int) -> generation_pb2.TokenIds:
    return generation_pb2.TokenIds(ids=ids)


def _request(*continuations: generation_pb2.Continuation) -> generation_pb2.Scoring:
    return generation_pb2.Scoring(text="a", continuations=continuations)


def _ids(tokens: Sequence[ScoredToken]) -> list[int]:
    return [token.id for token in tokens]


def test_a_text_is_scored_from_its_first_token_on(client: Client) -> None:
    (text,) = client.score(TEXT, top_logprobs=1)
    assert (text.first, _ids(text.tokens)) == (0, TOKENIZER.encode(TEXT))
    assert text.tokens[0] == ScoredToken(text.tokens[0].id, None, None, ())
    assert {(token.logprob, token.rank, token.top) for token in text.tokens[1:]} == {(*SCORE, ((5, -1.0),))}
    assert text.logprob == -2.0 * (len(text.tokens) - 1)


def test_each_continuation_is_scored_from_where_it_begins(client: Client) -> None:
    texts = client.score("And it came", [" to pass", " down"])
    for text, whole in zip(texts, ("And it came to pass", "And it came down"), strict=True):
        assert text.first == len(TOKENIZER.encode("And it came"))
        assert _ids(text.tokens) == TOKENIZER.encode(whole)[text.first :]
        assert all(token.logprob == -2.0 for token in text.tokens)
    (text,) = client.score([7, 8, 9], [[10, 11]])
    assert (text.first, _ids(text.tokens)) == (3, [10, 11])
    (text,) = client.score([7, 8, 9], [[10, 11]], score_from=1)
    assert (text.first, _ids(text.tokens)) == (1, [8, 9, 10, 11])


def test_a_continuation_that_changes_the_context_s_last_token_is_scored_with_it(client: Client) -> None:
    context, whole = "And it ca", TOKENIZER.encode("And it came")
    (text,) = client.score(context, ["me"])
    alike = text.first
    assert alike < len(TOKENIZER.encode(context))
    assert TOKENIZER.encode(context)[:alike] == whole[:alike]
    assert _ids(text.tokens) == whole[alike:]


def test_a_stream_comes_to_what_a_whole_answer_is(address: str, client: Client) -> None:
    prompt = [5 + i % 90 for i in range(200)]
    texts = client.score(prompt, [[7], [8, 9]], score_from=0)
    request = generation_pb2.Scoring(score_from=0)
    request.tokens.ids.extend(prompt)
    for ids in ([7], [8, 9]):
        request.continuations.add().tokens.ids.extend(ids)
    got: dict[int, list[int]] = {0: [], 1: []}
    with grpc.insecure_channel(address) as channel:
        parts = list(
            generation_pb2_grpc.GenerationServiceStub(channel).ScoreStream(
                generation_pb2.ScoreStreamRequest(scoring=request), timeout=20
            )
        )
    for part in parts:
        assert part.text.first == len(got[part.index])
        got[part.index] += [token.id for token in part.text.tokens]
    assert got == {i: _ids(text.tokens) for i, text in enumerate(texts)}
    assert [part.text.usage.prompt_tokens for part in parts if part.text.HasField("usage")] == [201, 202]


def test_a_completion_brings_its_prompt_s_scores_first(client: Client) -> None:
    whole = client.complete(TEXT, max_tokens=5, seed=1, ignore_eos=True, score_from=0)
    assert _ids(whole.prompt) == TOKENIZER.encode(TEXT)
    assert [token.logprob for token in whole.prompt][:2] == [None, -2.0]
    plain = client.complete(TEXT, max_tokens=5, seed=1, ignore_eos=True)
    assert (whole.tokens, whole.text, plain.prompt) == (plain.tokens, plain.text, ())
    seen, drawn = list[int](), list[int]()
    for part in client.generate(TEXT, max_tokens=5, seed=1, ignore_eos=True, score_from=2):
        assert not (part.prompt and drawn)
        seen += _ids(part.prompt)
        drawn += [token.id for token in part.tokens]
    assert seen == TOKENIZER.encode(TEXT)[2:]
    nothing = client.complete(TEXT, max_tokens=0, score_from=3)
    assert (_ids(nothing.prompt), nothing.tokens, nothing.finish_reason) == (TOKENIZER.encode(TEXT)[3:], (), "length")
    several = client.complete(TEXT, max_tokens=2, n=2, ignore_eos=True, score_from=1)
    assert (len(several.prompt), several.others[0].prompt) == (len(TOKENIZER.encode(TEXT)) - 1, ())


@pytest.mark.parametrize(
    ("request_", "field", "problem"),
    [
        (generation_pb2.Scoring(), "context", "is missing"),
        (generation_pb2.Scoring(text=""), "text", "is empty"),
        (
            generation_pb2.Scoring(text="a", continuations=[generation_pb2.Continuation()]),
            "continuations[0]",
            "is missing",
        ),
        (
            _request(generation_pb2.Continuation(tokens=_tokens(7))),
            "continuations[0]",
            "text or tokens, as the context is",
        ),
        (
            generation_pb2.Scoring(
                tokens=_tokens(7), continuations=[generation_pb2.Continuation(tokens=_tokens(5000))]
            ),
            "continuations[0].tokens",
            "has token 5000",
        ),
        (
            generation_pb2.Scoring(text="a", continuations=[generation_pb2.Continuation(text="b")] * 65),
            "continuations",
            "at most 64",
        ),
    ],
)
def test_each_wrong_field_is_named(request_: generation_pb2.Scoring, field: str, problem: str) -> None:
    with pytest.raises(GatewayError) as raised:
        now(to_completions(request_, LIMITS, TEXTS, ANONYMOUS, whole=True))
    assert f"scoring.{field}" in [violation.field for violation in raised.value.violations]
    assert problem in str(raised.value)


@pytest.mark.parametrize(
    ("context", "continuations", "options", "problem"),
    [
        ([7], [], {}, "the prompt has 1 tokens, and none is to be drawn"),
        ([7] * 600, [], {}, "the prompt has 600 tokens; the context of 512"),
        ([7, 8], [[9]], {"score_from": 3}, "score_from: is 3; the prompt has 3 tokens"),
        ([7, 8], [], {"top_logprobs": 9}, "top_logprobs: is 9"),
    ],
)
def test_what_can_not_be_scored_is_refused(
    client: Client, context: list[int], continuations: list[list[int]], options: dict[str, Any], problem: str
) -> None:
    with pytest.raises(grpc.RpcError) as raised:
        client.score(context, continuations, **options)
    assert raised.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert problem in (raised.value.details() or "")


def test_many_long_continuations_are_taken(client: Client) -> None:
    many = [" " + "word " * 240 + str(i) for i in range(64)]
    assert sum(map(len, many)) > 65536
    assert len(client.score("x", many)) == 64


def test_an_answer_that_would_be_too_large_is_to_be_streamed() -> None:
    limits = Limits(MODEL, 8192, TOKENIZER.longest_piece)
    many = [generation_pb2.Continuation(tokens=_tokens(9))] * 64
    request = generation_pb2.Scoring(tokens=_tokens(*[7] * 4000), continuations=many, score_from=0)
    with pytest.raises(GatewayError, match="or call ScoreStream, which streams"):
        now(to_completions(request, limits, TEXTS, ANONYMOUS, whole=True))
    assert len(now(to_completions(request, limits, TEXTS, ANONYMOUS, whole=False))) == 64


def _session(max_tokens: int = 4) -> Session:
    request = Request("r", (5, 6, 7, 8, 9), max_tokens, Sampling(seed=1), score_from=1)
    return Session(request, StopTexts.of([]), TOKENIZER, from_first=True)


def test_a_session_that_moves_asks_for_the_scores_that_it_lacks() -> None:
    async def check() -> None:
        session = _session()
        session.deliver(ScoreEvent("r", (Score(-1.0, 1), Score(-2.0, 2))))
        assert session.rest().score_from == 3
        session.deliver(ScoreEvent("r", (Score(-3.0, 3), Score(-4.0, 4))))
        assert session.rest().score_from is None
        session.deliver(TokenEvent("r", Token(7, -1.0, ()), None))
        deltas = await session.next_deltas()
        assert [(token.id, token.rank) for token in scored_tokens(deltas)] == [(5, 0), (6, 1), (7, 2), (8, 3), (9, 4)]
        assert [delta.token and delta.token.id for delta in deltas] == [None, None, 7]

    asyncio.run(check())


def test_a_replica_that_scores_nothing_is_no_reason_to_wait() -> None:
    async def check() -> None:
        session = _session()
        session.deliver(TokenEvent("r", Token(7, -1.0, ()), None))
        with pytest.raises(GatewayError, match="earlier release") as raised:
            await session.next_deltas()
        assert raised.value.code is grpc.StatusCode.UNAVAILABLE

    asyncio.run(check())


class _Breaking(generation_pb2_grpc.GenerationServiceServicer):
    """Each call brings two scored tokens of six and breaks; then come two tokens, one a call."""

    def __init__(self) -> None:
        self.asked: list[tuple[int | None, int]] = []

    def Generate(self, request: Any, context: Any) -> Iterator[generation_pb2.GenerateResponse]:  # noqa: N802
        completion = request.completion
        first = completion.score_from if completion.HasField("score_from") else None
        known = len(completion.resume.ids)
        self.asked.append((first, known))
        if first is not None and first < 6:
            prompt = [generation_pb2.ScoredToken(id=i) for i in (first, first + 1)]
            yield generation_pb2.GenerateResponse(prompt=prompt, seed=3)
        else:
            finish = generation_pb2.FINISH_REASON_LENGTH if known else generation_pb2.FINISH_REASON_UNSPECIFIED
            token = generation_pb2.GeneratedToken(id=known)
            yield generation_pb2.GenerateResponse(tokens=[token], seed=3, finish_reason=finish)
        context.abort(grpc.StatusCode.UNAVAILABLE, "gone")


def test_a_stream_that_breaks_goes_on_with_the_scores_that_it_lacks() -> None:
    server = grpc.server(concurrent.futures.ThreadPoolExecutor(2))
    servicer = _Breaking()  # type: ignore[abstract]  # the other methods are never called
    generation_pb2_grpc.add_GenerationServiceServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    with contextlib.ExitStack() as stack, Client(f"127.0.0.1:{port}") as client:
        stack.callback(server.stop, 0)
        parts = list(client.generate([1] * 6, max_tokens=2, score_from=0))
    assert [token.id for part in parts for token in part.prompt] == [0, 1, 2, 3, 4, 5]
    assert [token.id for part in parts for token in part.tokens] == [0, 1]
    assert servicer.asked == [(0, 0), (2, 0), (4, 0), (6, 0), (None, 1)]
