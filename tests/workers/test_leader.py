"""The leader's loop, with a fake mesh: nobody waits for ever, whoever comes and goes."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from grok.engine.v1 import engine_pb2
from tests.fake_mesh import FakeRuntime, leading
from workers.engine.plan import EngineShape, StepTokens
from workers.link import Link, connect


@contextlib.contextmanager
def _leading(slots: int, max_waiting: int = 10) -> Iterator[Link]:
    """A gateway's stream to a leader with `slots` slots."""
    shape = EngineShape(slots=slots, groups=1, pages=9, page_size=4, chunk=8, context=32)
    with leading(shape, 100, max_waiting) as address:
        link = connect(address, engine_pb2.Hello(epoch=1, secret=b"s"), 5)
        link.settimeout(5)
        try:
            yield link
        finally:
            link.close()


def _submit(link: Link, id: str, max_tokens: int = 1, **sampling: Any) -> None:
    submit = engine_pb2.Submit(request_id=id, prompt=[3, 4], max_tokens=max_tokens)
    submit.sampling.CopyFrom(engine_pb2.Sampling(top_p=1.0, **sampling))
    link.send(engine_pb2.LeaderInput(submit=submit).SerializeToString())


def _until(link: Link, count: int) -> tuple[dict[str, int], dict[str, str]]:
    """Tokens of each request and reasons of refusals, until `count` requests have ended one way or the other."""
    tokens: dict[str, int] = {}
    refused: dict[str, str] = {}
    ended = 0
    while ended < count:
        output = engine_pb2.LeaderOutput.FromString(link.receive() or b"")
        for event in output.tokens:
            tokens[event.request_id] = tokens.get(event.request_id, 0) + 1
            ended += event.finish != engine_pb2.FINISH_UNSPECIFIED
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
            output = engine_pb2.LeaderOutput.FromString(link.receive() or b"")
            assert not output.HasField("load"), "it lives, and that is all"
        computed.set()
        while not output.HasField("load"):
            output = engine_pb2.LeaderOutput.FromString(link.receive() or b"")


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
        _submit(link, "uneven", bias_tokens=[1, 2], bias_values=[0.5])
        _submit(link, "sound", max_tokens=3)
        tokens, refused = _until(link, 3)
        assert tokens == {"sound": 3}
        assert refused.keys() == {"too large", "uneven"}
