"""The client tries again where that is safe, and only there."""

from __future__ import annotations

import concurrent.futures
import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import pytest

from cluster.gateway.errors import GatewayError, Violation, exhausted, invalid, unavailable
from grok.serving.v1 import generation_pb2, generation_pb2_grpc
from grokmesh import Client


class _Server(generation_pb2_grpc.GenerationServiceServicer):
    """Answers calls with what a script says: errors, or a response. A stream of four parts fails after its first `broken`."""

    def __init__(self, script: list[GatewayError | None], broken: int = 9) -> None:
        self.script = script
        self.broken = broken
        self.calls = 0

    def _next(self, context: Any) -> None:
        self.calls += 1
        error = self.script.pop(0) if self.script else None
        if error is not None:
            context.abort_with_status(error.status())

    def CountTokens(self, request: Any, context: Any) -> generation_pb2.CountTokensResponse:  # noqa: N802
        self._next(context)
        return generation_pb2.CountTokensResponse(tokens=3)

    def Generate(self, request: Any, context: Any) -> Iterator[generation_pb2.GenerateResponse]:  # noqa: N802
        self._next(context)
        completion = request.completion
        known = list(completion.resume.ids)
        assert known == list(range(len(known)))
        assert (completion.sampling.seed == 77) == bool(known)
        for i in range(len(known), 4):
            if i - len(known) == self.broken:
                context.abort_with_status(unavailable("lost", retry_seconds=0.0).status())
            last = generation_pb2.FINISH_REASON_EOS if i == 3 else generation_pb2.FINISH_REASON_UNSPECIFIED
            token = generation_pb2.GeneratedToken(id=i)
            yield generation_pb2.GenerateResponse(text="abcd"[i], tokens=[token], finish_reason=last, seed=77)
        if self.broken == 4:
            context.abort_with_status(unavailable("lost").status())


def _server(script: list[GatewayError | None], broken: int = 9) -> _Server:
    return _Server(script, broken)  # type: ignore[abstract]  # the other methods are never called


@contextlib.contextmanager
def _serving(servicer: Any) -> Iterator[Client]:
    server = grpc.server(concurrent.futures.ThreadPoolExecutor(2))
    generation_pb2_grpc.add_GenerationServiceServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        with Client(f"127.0.0.1:{port}", attempts=3) as client:
            yield client
    finally:
        server.stop(0).wait()


def _text(client: Client) -> str:
    return "".join(part.text for part in client.generate("x"))


def _count(client: Client) -> int:
    return client.count_tokens("x")


@pytest.mark.parametrize("call", [_text, _count])
def test_unavailable_is_tried_again_not_before_the_server_wants(call: Callable[[Client], object]) -> None:
    servicer = _server([unavailable("not yet", retry_seconds=0.6), None])
    with _serving(servicer) as client:
        began = time.monotonic()
        assert call(client) in ("abcd", 3)
        assert time.monotonic() - began >= 0.6
    assert servicer.calls == 2


@pytest.mark.parametrize("call", [_text, _count])
def test_a_call_that_a_stopping_server_cancels_is_tried_again(call: Callable[[Client], object]) -> None:
    servicer = _server([GatewayError(grpc.StatusCode.CANCELLED, "STOPPED", "CANCELLED"), None])
    with _serving(servicer) as client:
        assert call(client) in ("abcd", 3)
    assert servicer.calls == 2


def test_a_stream_whose_channel_is_closed_is_not_tried_again() -> None:
    servicer = _server([])
    with _serving(servicer) as client:
        parts = client.generate("x")
        next(parts)
        client.close()
        with contextlib.suppress(grpc.RpcError):
            list(parts)  # what had come is told; then it ends
    assert servicer.calls == 1


@pytest.mark.parametrize("call", [_text, _count])
def test_it_gives_up_after_its_attempts(call: Callable[[Client], object]) -> None:
    servicer = _server([unavailable("never", retry_seconds=0.0)] * 9)
    with _serving(servicer) as client, pytest.raises(grpc.RpcError):
        call(client)
    assert servicer.calls == 3


@pytest.mark.parametrize("call", [_text, _count])
@pytest.mark.parametrize("error", [invalid([Violation("f", "p")]), exhausted("full", 0.1)])
def test_other_errors_are_told_at_once(call: Callable[[Client], object], error: GatewayError) -> None:
    servicer = _server([error])
    with _serving(servicer) as client, pytest.raises(grpc.RpcError):
        call(client)
    assert servicer.calls == 1


@pytest.mark.parametrize(("broken", "calls"), [(1, 4), (2, 2), (3, 2), (4, 1), (9, 1)])
def test_a_stream_that_broke_goes_on_after_what_it_has_brought(broken: int, calls: int) -> None:
    servicer = _server([], broken)
    with _serving(servicer) as client:
        assert _text(client) == "abcd"
    assert servicer.calls == calls


def test_a_stream_that_brings_nothing_more_is_given_up() -> None:
    servicer = _server([], broken=0)
    with _serving(servicer) as client, pytest.raises(grpc.RpcError):
        _text(client)
    assert servicer.calls == 3


class _Several(generation_pb2_grpc.GenerationServiceServicer):
    """Completions of three tokens each, which are seed, index and place; the first call breaks after `broken` parts."""

    def __init__(self, broken: int) -> None:
        self.broken = broken
        self.asked: list[tuple[int, int, int]] = []

    def Generate(self, request: Any, context: Any) -> Iterator[generation_pb2.GenerateResponse]:  # noqa: N802
        completion = request.completion
        count, known = max(1, completion.n), list(completion.resume.ids)
        seed = completion.sampling.seed if completion.sampling.HasField("seed") else 50
        self.asked.append((count, seed, len(known)))
        parts = 0
        for place in range(len(known), 3):
            for index in range(count):
                if len(self.asked) == 1 and parts == self.broken:
                    context.abort_with_status(unavailable("lost", retry_seconds=0.0).status())
                parts += 1
                last = generation_pb2.FINISH_REASON_EOS if place == 2 else generation_pb2.FINISH_REASON_UNSPECIFIED
                token = generation_pb2.GeneratedToken(id=100 * (seed + index) + place)
                yield generation_pb2.GenerateResponse(
                    tokens=[token], finish_reason=last, seed=seed + index, index=index
                )


@pytest.mark.parametrize(
    ("broken", "asked"),
    [
        (0, [(2, 50, 0), (2, 50, 0)]),
        (1, [(2, 50, 0), (1, 50, 1), (1, 51, 0)]),
        (3, [(2, 50, 0), (1, 50, 2), (1, 51, 1)]),
        (5, [(2, 50, 0), (1, 51, 2)]),
        (9, [(2, 50, 0)]),
    ],
)
def test_several_completions_at_once_go_on_where_they_broke_off(broken: int, asked: list[tuple[int, int, int]]) -> None:
    servicer = _Several(broken)  # type: ignore[abstract]  # the other methods are never called
    with _serving(servicer) as client:
        got: dict[int, list[int]] = {0: [], 1: []}
        for part in client.generate("x", n=2):
            got[part.index] += [token.id for token in part.tokens]
            assert part.seed == 50 + part.index
    assert got == {0: [5000, 5001, 5002], 1: [5100, 5101, 5102]}
    assert servicer.asked == asked
