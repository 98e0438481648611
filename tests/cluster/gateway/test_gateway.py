"""The gateway's parts without a network: validation, stop texts, sessions, admission, errors."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import math
import urllib.parse
from typing import Unpack

import grpc
import pytest
from google.protobuf import any_pb2
from google.rpc import error_details_pb2, status_pb2
from hypothesis import given
from hypothesis import strategies as st

from cluster.controller.ledger import Ledger
from cluster.gateway.admission.admission import MARGIN, Admission
from cluster.gateway.auth.api_keys import ANONYMOUS, Caller
from cluster.gateway.errors import GatewayError, Violation, code_name, exhausted, invalid
from cluster.gateway.session import Delta, Session
from cluster.gateway.stop import StopMatcher, StopTexts
from cluster.gateway.validation import Limits, to_request
from grok.serving.v1 import generation_pb2
from grokmesh import Options, completion_request
from tests.support.fake_service import MODEL, TOKENIZER, InlineTexts, now
from workers.messages.plan import Sampling, Token
from workers.messages.request import Finish, Request, TokenEvent

LIMITS = Limits(MODEL, 64, TOKENIZER.longest_piece)
TEXTS = InlineTexts()


def _checked(completion: generation_pb2.Completion, *, whole: bool = False) -> Request:
    return now(to_request(completion, LIMITS, TEXTS, ANONYMOUS, "r", whole=whole))


def _request(prompt: str | list[int], **options: Unpack[Options]) -> Request:
    return _checked(completion_request(prompt, **options))


@pytest.mark.parametrize(
    ("prompt", "options", "field", "problem"),
    [
        ("", {}, "text", "is empty"),
        ([], {}, "tokens", "is empty"),
        ([5000], {}, "tokens", "has token 5000; the vocabulary has 2048"),
        ([5] * 64, {}, "tokens", "has 64 tokens; the context of 64 leaves room for a completion after at most 63"),
        (
            [5] * 60,
            {"max_tokens": 5},
            "max_tokens",
            "is 5; with the prompt's 60 tokens at most 4 fit the context of 64",
        ),
        ("x", {"max_tokens": 0}, "max_tokens", "is 0; must be at least 1, or 0 with score_from"),
        ("x", {"max_tokens": -5}, "max_tokens", "is -5; must be at least 1"),
        ("x", {"temperature": math.nan}, "sampling.temperature", "is nan; must be a number from 0 to 100"),
        ("x", {"temperature": -1.0}, "sampling.temperature", "is -1.0"),
        ("x", {"temperature": math.inf}, "sampling.temperature", "is inf"),
        ("x", {"top_p": 0.0}, "sampling.top_p", "is 0; must be more than 0 and at most 1"),
        ("x", {"top_p": 1.5}, "sampling.top_p", "is 1.5; must be more than 0 and at most 1"),
        ("x", {"top_p": math.nan}, "sampling.top_p", "is nan"),
        ("x", {"min_p": 1.5}, "sampling.min_p", "is 1.5; must be from 0 to 1"),
        ("x", {"repetition_penalty": 0.0}, "sampling.repetition_penalty", "is 0; must be more than 0"),
        ("x", {"presence_penalty": math.nan}, "sampling.presence_penalty", "is nan; must be from -2 to 2"),
        ("x", {"frequency_penalty": -3.0}, "sampling.frequency_penalty", "is -3; must be from -2 to 2"),
        ("x", {"n": 17}, "n", "is 17; must be from 1 to 16"),
        ("x", {"priority": 11}, "priority", "is 11; must be from -10 to 10"),
        ("x", {"regex": "(["}, "regex", "unclosed character class"),
        ("x", {"regex": "a" * 70_000}, "regex", "is longer than 65536 bytes"),
        ("x", {"json_schema": "{"}, "json_schema", "is no JSON"),
        ("x", {"json_schema": "[1]"}, "json_schema", "must be a JSON object"),
        ("x", {"json_schema": '{"type": "foo"}'}, "json_schema", "Invalid type: foo"),
        ("x", {"choice": ["a", ""]}, "choice", "none of them empty"),
        ("x", {"regex": "a+", "ignore_eos": True}, "ignore_eos", "can't be set together with regex"),
        ("x", {"top_k": -1}, "sampling.top_k", "is -1; must be at least 0"),
        ("x", {"logit_bias": {9999: 1.0}}, "sampling.logit_bias", "has token 9999"),
        ("x", {"logit_bias": {9: math.inf}}, "sampling.logit_bias", "is inf for token 9"),
        ("x", {"allowed_tokens": [7] * 4097}, "sampling.allowed_tokens", "has 4097 entries; at most 4096"),
        ("x", {"logit_bias": dict.fromkeys(range(1025), 1.0)}, "sampling.logit_bias", "has 1025 entries; at most 1024"),
        ("x", {"allowed_tokens": [2048]}, "sampling.allowed_tokens", "has token 2048"),
        ("x", {"top_logprobs": 9}, "top_logprobs", "is 9; must be from 0 to 8"),
        ("x", {"stop": [""]}, "stop[0]", "must have 1 to 1024 bytes"),
        ("x", {"stop": ["a"] * 17}, "stop", "has 17 texts; at most 16"),
        ("x", {"stop_token_ids": [7] * 65}, "stop_token_ids", "has 65 tokens; at most 64"),
        ("x", {"stop_token_ids": [2048]}, "stop_token_ids", "has token 2048"),
        ("x", {"min_tokens": -1}, "min_tokens", "is -1; must be from 0 to max_tokens=64"),
        ("x", {"min_tokens": 6, "max_tokens": 5}, "min_tokens", "is 6; must be from 0 to max_tokens=5"),
        ("x", {"min_tokens": 1, "allowed_tokens": [2, 7], "stop_token_ids": [7]}, "min_tokens", "can't be kept"),
    ],
)
def test_each_wrong_field_is_named(prompt: str | list[int], options: Options, field: str, problem: str) -> None:
    with pytest.raises(GatewayError) as raised:
        _request(prompt, **options)
    assert raised.value.code is grpc.StatusCode.INVALID_ARGUMENT
    (violation,) = raised.value.violations
    assert violation.field == f"completion.{field}"
    assert problem in violation.problem


@pytest.mark.parametrize(
    ("ids", "change", "problem"),
    [
        ([7, 8], {}, "needs the seed that the responses carried"),
        ([7] * 5, {"seed": 1}, "has 5 tokens; must be fewer than max_tokens=5"),
        ([2048], {"seed": 1}, "has token 2048; the vocabulary has 2048"),
        ([7], {"seed": 1, "stop_token_ids": [7]}, "has a token that ends it: that completion is whole"),
        ([7, 2], {"seed": 1}, "has a token that ends it: that completion is whole"),
        ([7], {"seed": 1, "n": 2}, "can't be set together with n"),
    ],
)
def test_what_can_not_be_resumed_is_refused(ids: list[int], change: Options, problem: str) -> None:
    completion = completion_request("x", **change)
    completion.max_tokens = 5
    completion.resume.ids.extend(ids)
    with pytest.raises(GatewayError) as raised:
        _checked(completion)
    assert [(v.field, v.problem) for v in raised.value.violations] == [("completion.resume", problem)]


@pytest.mark.parametrize("known", [0, 1, 3, 6])
def test_a_resumed_session_tells_the_rest_and_knows_the_stop_text_that_spans_the_break(known: int) -> None:
    ids = TOKENIZER.encode("the lion and the mouse went home")
    whole = TOKENIZER.decode(ids)
    stop = whole[-9:-2]
    texts = []
    for resumed in ((), tuple(ids[:known])):
        session = Session(Request("r", (5,), len(ids), Sampling(), resumed=resumed), StopTexts.of([stop]), TOKENIZER)
        asyncio.run(session.catch_up())
        text = ""
        for i, id in enumerate(ids[len(resumed) :], len(resumed) + 1):
            session.deliver(TokenEvent("r", Token(id, 0.0, ()), Finish.LENGTH if i == len(ids) else None))
        while session.finish is None:
            text += "".join(delta.text for delta in asyncio.run(session.next_deltas()))
        assert session.finish == generation_pb2.FINISH_REASON_STOP
        texts.append(text)
    assert texts[0].strip() == whole[:-9].strip()
    assert texts[0].endswith(texts[1])
    begun = Session(Request("r", (5,), len(ids), Sampling()), StopTexts.of([stop]), TOKENIZER)
    for id in ids[:known]:
        begun.deliver(TokenEvent("r", Token(id, 0.0, ()), None))
    before = "".join(delta.text for delta in asyncio.run(begun.next_deltas())) if known else ""
    assert before + texts[1] == texts[0]


def test_all_wrong_fields_are_named_at_once() -> None:
    with pytest.raises(GatewayError) as raised:
        _request("x", top_p=2.0, temperature=-1.0, max_tokens=0)
    assert len(raised.value.violations) == 3


def test_an_answer_that_no_client_could_take_is_refused_before_the_work() -> None:
    completion = completion_request("x", n=16, max_tokens=3000, top_logprobs=8)
    grok = Limits(MODEL, 8192, 48)
    whole = to_request(completion, grok, TEXTS, ANONYMOUS, "r", whole=True)
    with pytest.raises(GatewayError, match=r"may make an answer of .* call Generate, which streams"):
        now(whole)
    assert now(to_request(completion, grok, TEXTS, ANONYMOUS, "r", whole=False)).max_tokens == 3000


def test_a_status_with_many_long_violations_is_small_enough_to_arrive() -> None:
    error = invalid([Violation(f"completion.field{i}", "\N{SNOWMAN}" * 5000) for i in range(99)])
    ((_, details),) = error.status().trailing_metadata or ()
    # As they travel: one in base64, the other with each character that is not ASCII as nine.
    assert len(details) * 4 / 3 + len(urllib.parse.quote(str(error.status().details))) < 8000


def test_what_a_grammar_ends_with_is_never_forbidden() -> None:
    (a,) = (id for id in range(TOKENIZER.vocab_size) if TOKENIZER.spelled(id) == b"a" and TOKENIZER.byte(id) is None)
    assert _request("x", regex="a+", allowed_tokens=[a]).sampling.allowed_tokens == (LIMITS.model.eos_token, a)
    assert LIMITS.model.eos_token not in _request("x", allowed_tokens=[300]).sampling.allowed_tokens


def test_what_is_absent_gets_its_documented_meaning() -> None:
    request = _request("In the beginning")
    assert request.max_tokens == 64 - len(request.prompt)
    assert (request.sampling.temperature, request.sampling.top_p, request.sampling.top_k) == (1.0, 1.0, 0)
    assert request.stop_tokens == {LIMITS.model.eos_token}
    assert _request("x").sampling.seed != _request("x").sampling.seed
    assert _request("x", ignore_eos=True).stop_tokens == frozenset()
    assert (request.min_tokens, request.sampling.masked) == (0, False)


def test_a_completion_ends_with_tokens_that_its_caller_names_and_not_too_early() -> None:
    request = _request("x", stop_token_ids=[7, 8], min_tokens=3)
    assert request.stop_tokens == {LIMITS.model.eos_token, 7, 8}
    assert (request.min_tokens, request.sampling.masked) == (3, True)
    assert _request("x", stop_token_ids=[7], ignore_eos=True).stop_tokens == {7}
    endless = _request("x", ignore_eos=True, min_tokens=3)
    assert (endless.min_tokens, endless.sampling.masked) == (0, False)


@given(
    st.lists(st.text("ab", min_size=1, max_size=3), max_size=3),
    st.lists(st.text("ab", max_size=3), max_size=12),
    st.booleans(),
)
def test_text_is_shown_up_to_the_first_stop_text(stops: list[str], pieces: list[str], included: bool) -> None:
    matcher = StopMatcher(StopTexts.of(stops, shown=included))
    shown, stopped = "", False
    for piece in pieces:
        text, stopped = matcher.push(piece)
        shown += text
        if stopped:
            break
    if not stopped:
        shown += matcher.flush()
    whole = "".join(pieces)
    # The first moment at which a stop text is complete decides; of those complete then, the earliest.
    ends = [end for end in range(len(whole) + 1) if any(whole[:end].endswith(stop) for stop in stops)]
    assert stopped == bool(ends)
    if not ends:
        assert shown == whole
    elif included:
        assert shown == whole[: ends[0]]
    else:
        assert whole.startswith(shown)
        assert not any(stop in shown for stop in stops)


def _token(id: int) -> Token:
    return Token(id, -1.0, ())


async def _collect(session: Session) -> list[Delta]:
    deltas: list[Delta] = []
    while not deltas or deltas[-1].finish is None:
        deltas += await session.next_deltas()
    return deltas


def _play(text: str, stops: tuple[str, ...], finish: Finish) -> tuple[str, list[Delta]]:
    """A session that is sent the tokens of a text after a prompt."""
    prompt = TOKENIZER.encode("And")
    ids = TOKENIZER.encode("And" + text)[len(prompt) :]
    session = Session(Request("r", tuple(prompt), 50, Sampling()), StopTexts.of(stops), TOKENIZER)
    events = [TokenEvent("r", _token(id), None) for id in ids]
    if finish is Finish.EOS:
        events.append(TokenEvent("r", _token(2), Finish.EOS))
    else:
        events[-1] = TokenEvent("r", _token(ids[-1]), Finish.LENGTH)
    for event in events:
        session.deliver(event)
    deltas = asyncio.run(_collect(session))
    return "".join(delta.text for delta in deltas), deltas


def test_a_session_ends_with_the_end_token() -> None:
    text, deltas = _play(" he said unto them", (), Finish.EOS)
    assert text == " he said unto them"
    assert deltas[-1].finish == generation_pb2.FINISH_REASON_EOS
    assert deltas[-1].token == _token(2)


def test_a_token_that_the_caller_named_ends_a_session_as_a_stop_text_does() -> None:
    session = Session(Request("r", (5,), 50, Sampling()), StopTexts.of(()), TOKENIZER, stop_tokens=[7])
    session.deliver(TokenEvent("r", _token(300), None))
    session.deliver(TokenEvent("r", _token(7), Finish.EOS))
    deltas = asyncio.run(_collect(session))
    assert [delta.token for delta in deltas] == [_token(300), _token(7)]
    assert deltas[-1].finish == generation_pb2.FINISH_REASON_STOP
    assert deltas[-1].text == "", "the token that ends it has no text"


def test_a_session_ends_at_a_stop_text_that_spans_tokens() -> None:
    text, deltas = _play(" he said unto them all", ("said un",), Finish.LENGTH)
    assert text == " he "
    assert deltas[-1].finish == generation_pb2.FINISH_REASON_STOP


def test_what_was_held_back_for_a_stop_text_is_shown_at_the_end() -> None:
    text, deltas = _play(" he said unto", ("unto them",), Finish.LENGTH)
    assert text == " he said unto"
    assert deltas[-1].finish == generation_pb2.FINISH_REASON_LENGTH


def test_an_error_comes_after_the_tokens_before_it() -> None:
    session = Session(Request("r", (5,), 50, Sampling()), StopTexts.of(()), TOKENIZER)
    session.deliver(TokenEvent("r", _token(10), None))
    session.deliver(exhausted("full", 1.0))

    async def read() -> None:
        assert len(await session.next_deltas()) == 1
        with pytest.raises(GatewayError, match="full"):
            await session.next_deltas()

    asyncio.run(read())


def test_admission_is_bounded_and_ends_when_draining() -> None:
    admission = Admission(2)
    with admission.admitted(ANONYMOUS), admission.admitted(ANONYMOUS):
        with pytest.raises(GatewayError) as raised, admission.admitted(ANONYMOUS):
            pass
        assert raised.value.code is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert raised.value.retry_seconds == 1.0
    assert admission.in_flight == 0
    admission.draining = True
    with pytest.raises(GatewayError) as raised, admission.admitted(ANONYMOUS):
        pass
    assert raised.value.code is grpc.StatusCode.UNAVAILABLE


def _admit(admission: Admission, stack: contextlib.ExitStack, caller: Caller, wanted: int) -> int:
    """How many of `wanted` requests of a key get a place."""
    for i in range(wanted):
        try:
            stack.enter_context(admission.admitted(caller))
        except GatewayError:
            return i
    return wanted


def test_a_key_that_floods_the_gateway_leaves_places_to_others() -> None:
    admission = Admission(16)
    with contextlib.ExitStack() as stack:
        assert _admit(admission, stack, Caller("greedy"), 99) == 8
        assert _admit(admission, stack, Caller("modest", max_requests=2), 99) == 2
        assert _admit(admission, stack, Caller("other"), 99) == 3
        assert admission.in_flight == 13
    assert admission.in_flight == 0
    with contextlib.ExitStack() as stack:
        assert _admit(admission, stack, ANONYMOUS, 99) == 16  # where there are no keys there are no others


def test_a_key_gets_its_tokens_a_minute_and_is_told_when_there_are_more() -> None:
    now = 100.0
    admission = Admission(16, clock=lambda: now)
    caller = Caller("alice", tokens_per_minute=60)
    with admission.admitted(caller):
        admission.used(caller, 90)
    with pytest.raises(GatewayError) as raised, admission.admitted(caller):
        pass
    assert raised.value.code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert raised.value.retry_seconds == pytest.approx(31.0)
    now += 31.0
    with admission.admitted(caller):
        pass
    now += 3600.0
    with admission.admitted(caller):
        admission.used(caller, 61)  # no more than a minute's worth was saved
    with pytest.raises(GatewayError), admission.admitted(caller):
        pass
    with admission.admitted(Caller("bob")):
        pass


def test_the_limits_of_a_key_hold_over_all_gateways() -> None:
    now = 100.0
    ledger, gateways = Ledger(), {name: Admission(16, clock=lambda: now) for name in ("one", "other")}

    def report() -> None:
        for name, gateway in gateways.items():
            uses = gateway.uses()
            gateway.learn(uses, ledger.report(name, uses, now))

    one, other = gateways.values()
    caller = Caller("alice", tokens_per_minute=60, max_requests=2)
    report()
    with one.admitted(caller, 2):
        report()
        with pytest.raises(GatewayError, match="2 requests of this key are under way already"):
            other.check(caller)
    one.used(caller, 50)
    report()
    other.check(caller)  # 10 are left
    other.used(caller, 40)
    report()
    report()  # the first one has reported before the other had
    for gateway in gateways.values():
        with pytest.raises(GatewayError) as raised:
            gateway.check(caller)
        assert raised.value.retry_seconds == pytest.approx(31.0)
    now += 31.0
    report()
    one.check(caller)


def test_who_would_wait_too_long_is_turned_away_and_told_until_when() -> None:
    admission = Admission(16, queue_seconds=10)
    admission.check_wait(9.0, None)
    admission.check_wait(4.0, left=9.0 * MARGIN, own=5.0)
    for wait, left, own, retry in ((12.5, None, 0.0, 2.5), (12.5, 99.0, 0.0, 2.5), (6.0, 9.0 * MARGIN, 5.0, 2.0)):
        with pytest.raises(GatewayError) as raised:
            admission.check_wait(wait, left, own)
        assert raised.value.code is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert raised.value.retry_seconds == pytest.approx(retry)
    admission.check_wait(0.0, left=1.0, own=5.0)  # nobody waits, so it may be lucky


def test_a_status_carries_its_details() -> None:
    status = exhausted("too much", 2.5).status()
    (key, value), pushback = status.trailing_metadata or ()
    assert pushback == ("grpc-retry-pushback-ms", "2500")
    assert key == "grpc-status-details-bin"
    details = status_pb2.Status.FromString(value if isinstance(value, bytes) else value.encode()).details
    info, retry = error_details_pb2.ErrorInfo(), error_details_pb2.RetryInfo()
    packed: list[any_pb2.Any] = list(details)
    assert packed[0].Unpack(info)
    assert (info.reason, info.domain) == ("OVERLOADED", "grokmesh")
    assert packed[1].Unpack(retry)
    assert retry.retry_delay.ToMilliseconds() == 2500


def test_keys_find_nothing_of_each_others_prompts_unless_they_may() -> None:
    def salt(name: str, limits: Limits, **options: Unpack[Options]) -> str:
        completion = completion_request("x", **options)
        return now(to_request(completion, limits, TEXTS, Caller(name), "r", whole=False)).salt

    assert salt("a", LIMITS) == salt("a", LIMITS) != salt("b", LIMITS)
    assert salt("a", LIMITS, cache_salt="s") != salt("a", LIMITS)
    shared = dataclasses.replace(LIMITS, share_prefixes=True)
    assert salt("a", shared) == salt("b", shared) != salt("b", shared, cache_salt="s")


def test_a_client_that_leaves_at_its_deadline_has_met_it() -> None:
    """Its clock began before the gateway's: what it sends at its deadline arrives while a little time seems to be left."""
    left = asyncio.CancelledError()
    assert [code_name(left, seconds) for seconds in (-0.1, 0.02)] == ["DEADLINE_EXCEEDED"] * 2
    assert [code_name(left, seconds) for seconds in (1.0, None)] == ["CANCELLED"] * 2
