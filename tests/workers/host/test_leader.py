"""The leader's loop, with a fake mesh: nobody waits for ever, whoever comes and goes."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from tests.support.fake_mesh import FakeRuntime, leading
from tests.support.fake_service import ARGUMENTS, MODEL
from tests.support.waiting import wait_until
from workers.host.streams import Link, LinkError, connect
from workers.messages.codec import decode, encode
from workers.messages.frames import Hello, LeaderInput, LeaderOutput, Refusal, RefusalKind
from workers.messages.plan import EngineShape, Sampling, StepTokens
from workers.messages.request import TRIAL_TOKENS, Ahead, Request
from workers.text.grammar import json_schema, regex
from workers.text.sandbox import Sandbox

SHAPE = EngineShape(slots=1, groups=1, pages=9, page_size=4, chunk=8, context=32)


@contextlib.contextmanager
def _leading(slots: int, vocab_size: int = 100, sandbox: Sandbox | None = None) -> Iterator[Link]:
    """A gateway's stream to a leader with `slots` slots."""
    with leading(dataclasses.replace(SHAPE, slots=slots), vocab_size, 10, sandbox=sandbox) as address:
        link = connect(address, Hello(1, b"s"), 5)
        link.settimeout(5)
        try:
            yield link
        finally:
            link.close()


def _submit(link: Link, id: str, max_tokens: int = 1, **sampling: Any) -> None:
    link.send(encode(LeaderInput(Request(id, (3, 4), max_tokens, Sampling(**sampling)))))


def _until(link: Link, count: int) -> tuple[dict[str, int], dict[str, str]]:
    """Tokens of each request and reasons of refusals, until `count` requests have ended one way or the other."""
    tokens: dict[str, int] = {}
    refused: dict[str, str] = {}
    ended = 0
    while ended < count:
        output = decode(LeaderOutput, link.receive() or b"")
        for event in output.tokens:
            tokens[event.request_id] = tokens.get(event.request_id, 0) + 1
            ended += event.finish is not None
        for refusal in output.refusals:
            refused[refusal.request_id] = refusal.reason
            ended += 1
    return tokens, refused


def test_nobody_hears_of_a_mesh_that_has_computed_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    computed = threading.Event()
    read = FakeRuntime.read

    def slow(self: FakeRuntime, pending: Any) -> StepTokens:
        assert computed.wait(10)
        return read(self, pending)

    monkeypatch.setattr(FakeRuntime, "read", slow)
    with _leading(slots=1) as link:
        for _ in range(3):
            output = decode(LeaderOutput, link.receive() or b"")
            assert output.load is None, "it lives, and that is all"
        computed.set()
        while output.load is None:
            output = decode(LeaderOutput, link.receive() or b"")


def test_who_waits_for_a_slot_gets_it_without_anybody_else_asking() -> None:
    with _leading(slots=1) as link:
        for i in range(5):
            _submit(link, f"r{i}")
        assert _until(link, 5)[0] == {f"r{i}": 1 for i in range(5)}


def test_who_waits_for_pages_gets_them() -> None:
    with _leading(slots=4) as link:
        for i in range(4):
            _submit(link, f"r{i}", max_tokens=20)  # six of eight pages each
        assert _until(link, 4)[0] == {f"r{i}": 20 for i in range(4)}


def test_requests_that_make_no_sense_are_refused_and_others_go_on() -> None:
    with _leading(slots=2) as link:
        _submit(link, "too large", top_k=2**31)
        _submit(link, "curious", top_logprobs=9)
        _submit(link, "sound", max_tokens=3)
        tokens, refused = _until(link, 3)
        assert tokens == {"sound": 3}
        assert refused.keys() == {"too large", "curious"}


def test_a_request_that_comes_again_over_another_stream_goes_on_there() -> None:
    with leading(SHAPE, 100, 10, seconds=0.02) as address:
        first, second = (connect(address, Hello(1, b"s"), 5) for _ in range(2))
        for link in (first, second):
            link.settimeout(5)
            _submit(link, "r", max_tokens=20)
            while not decode(LeaderOutput, link.receive() or b"").tokens:
                pass
        tokens, refused = _until(second, 1)
        assert tokens["r"] > 10
        assert not refused
        _submit(second, "other", max_tokens=20)
        _submit(second, "other")
        assert "in use" in _until(second, 1)[1]["other"]
        for link in (first, second):
            link.close()


def test_gateways_know_which_request_is_on_trial_before_it_is_computed() -> None:
    with _leading(slots=2) as link:
        link.send(encode(LeaderInput(Request("r", (3, 4), 20, Sampling(), trial=True))))
        news: list[object] = []
        while "end" not in news:
            output = decode(LeaderOutput, link.receive() or b"")
            if output.trying is not None:
                news.append(output.trying)
            news += ["end" if event.finish else "token" for event in output.tokens]
        assert news.index("r") == 0
        assert TRIAL_TOKENS <= news.index("") <= TRIAL_TOKENS + 2, "it is over before the request is"


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    """In which the leader's grammars are followed."""
    made = Sandbox("workers.text.grammar_job", ARGUMENTS)
    yield made
    made.close()


def _formatted(link: Link, id: str, grammar: str) -> None:
    link.send(encode(LeaderInput(Request(id, (3, 4), 8, Sampling(masked=True), grammar=grammar))))


def _outcomes(link: Link, names: set[str]) -> dict[str, Refusal | None]:
    """How requests end: None for one that is whole."""
    ended: dict[str, Refusal | None] = {}
    while ended.keys() != names:
        output = decode(LeaderOutput, link.receive() or b"")
        link.send(encode(LeaderInput()))  # as a gateway shows that it lives, however long a format takes
        ended |= {refusal.request_id: refusal for refusal in output.refusals}
        ended |= {event.request_id: None for event in output.tokens if event.finish}
    return ended


def test_a_format_that_is_costly_or_that_the_tokens_leave_ends_that_request_and_no_other(sandbox: Sandbox) -> None:
    with _leading(slots=4, vocab_size=MODEL.vocab_size, sandbox=sandbox) as link:
        link.settimeout(60)
        _formatted(link, "costly", json_schema('{"type": "integer", "multipleOf": 16777216}'))
        _formatted(link, "left", regex("[a-z]+"))  # the mesh draws token 5, which is none
        for i in range(6):
            _submit(link, f"r{i}", max_tokens=20)
        ended = _outcomes(link, {"costly", "left", *(f"r{i}" for i in range(6))})
    costly, left = ended.pop("costly"), ended.pop("left")
    assert not any(ended.values())
    assert costly is not None
    assert (costly.kind, "it takes more than" in costly.reason) == (RefusalKind.FAILED, True)
    assert left is not None
    assert left.kind is RefusalKind.FAILED


def test_a_request_that_is_cancelled_while_its_format_is_read_is_forgotten(sandbox: Sandbox) -> None:
    with _leading(slots=4, vocab_size=MODEL.vocab_size, sandbox=sandbox) as link:
        _formatted(link, "r", json_schema('{"type": "integer", "multipleOf": 250007}'))
        link.send(encode(LeaderInput(cancel="r")))
        _submit(link, "r")
        assert _outcomes(link, {"r"}) == {"r": None}, "the name is free again"


def test_a_mesh_that_computes_no_numbers_serves_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: FakeRuntime, pending: Any) -> StepTokens:
        tokens = read(self, pending)
        nothing = tuple(dataclasses.replace(token, logprob=math.nan) for token in tokens.prefilled)
        return dataclasses.replace(tokens, prefilled=nothing)

    read = FakeRuntime.read
    monkeypatch.setattr(FakeRuntime, "read", broken)
    raised: list[LinkError] = []
    with leading(SHAPE, 100, 10, ended=raised.append):
        wait_until(lambda: bool(raised), 10)
    assert "the mesh computes nothing of use: the model gave no numbers" in str(raised[0])


def test_the_first_load_to_a_gateway_brings_what_the_mesh_computed_of_its_first_token() -> None:
    with _leading(slots=1) as link:
        loads: list[tuple[float, ...]] = []
        while len(loads) < 2:
            output = decode(LeaderOutput, link.receive() or b"")
            if output.load is not None:
                loads.append(output.canary)
            _submit(link, f"r{len(loads)}")
        assert loads == [(-1.0,), ()]


def test_a_gateway_gets_to_know_of_other_gateways_requests() -> None:
    with leading(dataclasses.replace(SHAPE, slots=1), 100, 10, seconds=0.1) as address:
        links = [connect(address, Hello(1, b"s"), 5) for _ in range(2)]
        one, other = links
        for id, priority in (("runs", 3), ("waits", 0)):
            one.send(encode(LeaderInput(submit=Request(id, (5,) * 4, 28, Sampling(), priority=priority))))
        found: tuple[Ahead, ...] = ()
        while len(found) < 2 or not any(one.generated for one in found):
            output = decode(LeaderOutput, other.receive() or b"")
            found = output.status.others if output.status is not None else found
        waits, runs = sorted(found, key=lambda one: one.priority)
        assert (runs.positions, runs.tokens) == (4, 28)
        assert waits == Ahead(4, 28, 0, 0)
        for link in links:
            link.close()
