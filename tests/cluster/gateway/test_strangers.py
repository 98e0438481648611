"""Nothing that a stranger or a tenant sends keeps the others from what they want."""

from __future__ import annotations

import contextlib
import json
import pathlib
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import grpc
import pytest
from google.protobuf import any_pb2
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc

from cluster.gateway.auth.api_keys import new_key
from cluster.gateway.interceptor import MOST_OPEN
from grok.serving.v1 import generation_pb2, generation_pb2_grpc
from grokmesh import Client, Options, completion_request
from tests.support.fake_service import TOKENIZER, serving
from tools.bench.processes import resident

#: Seconds that others may have to wait because of one request. It is far from what they do wait, which benchmarks measure.
STANDSTILL = 1.0


@pytest.fixture(scope="module")
def service() -> Iterator[tuple[str, int]]:
    """Address and process of a gateway without keys."""
    with serving(0.01) as running:
        yield running


@contextlib.contextmanager
def _others_go_on(address: str) -> Iterator[None]:
    """While the block runs, health is asked for and a completion is streamed, and neither may stand still."""
    over, gaps = threading.Event(), [0.0]

    def look() -> None:
        with grpc.insecure_channel(address) as channel:
            stub: Any = health_pb2_grpc.HealthStub(channel)
            while not over.wait(0.01):
                began = time.monotonic()
                stub.Check(health_pb2.HealthCheckRequest(), timeout=60)
                gaps.append(time.monotonic() - began)

    def stream() -> None:
        with Client(address) as client:
            while not over.is_set():
                last = None
                for _ in client.generate("x", max_tokens=100, ignore_eos=True):
                    now = time.monotonic()
                    gaps.append(now - (last or now))
                    last = now

    threads = [threading.Thread(target=work) for work in (look, stream)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        over.set()
        for thread in threads:
            thread.join()
    assert len(gaps) > 3
    assert max(gaps) < STANDSTILL


def _refused(address: str, completion: generation_pb2.Completion) -> Any:
    request = generation_pb2.GenerateOnceRequest(completion=completion)
    with grpc.insecure_channel(address) as channel, pytest.raises(grpc.RpcError) as raised:
        generation_pb2_grpc.GenerationServiceStub(channel).GenerateOnce(request, timeout=60)
    return raised.value


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"json_schema": '{"type":"integer","multipleOf":86400000}'}, "is too costly"),
        ({"json_schema": '{"type":"integer","multipleOf":16777216}'}, "is too costly"),
        ({"regex": "(a{1000}){1000}"}, "is too costly"),
        ({"regex": "a" * 983 + "("}, "invalid regex"),
        ({"regex": "[0-9]{3}", "allowed_tokens": [300]}, "none of the tokens that may be drawn can follow"),
        ({"json_schema": '{"const": NaN}'}, "NaN is no number of JSON"),
        ({"logit_bias": dict.fromkeys(range(5000, 5055), 1.0)}, "has token 5000"),
    ],
)
def test_a_costly_or_senseless_request_is_refused_with_a_reason_that_arrives(
    service: tuple[str, int], options: Options, problem: str
) -> None:
    with _others_go_on(service[0]):
        error = _refused(service[0], completion_request("x", **options))
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert problem in error.details()
    (details,) = [value for key, value in error.trailing_metadata() if key == "grpc-status-details-bin"]
    packed: list[any_pb2.Any] = list(status_pb2.Status.FromString(details).details)
    assert packed[1].Unpack(error_details_pb2.BadRequest())


def test_a_completion_whose_format_can_not_go_on_ends_with_an_error_and_not_as_whole(service: tuple[str, int]) -> None:
    # The mesh draws token 5, whatever is allowed.
    error = _refused(service[0], completion_request("x", max_tokens=8, regex="[a-z]+"))
    assert error.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert "the completion can't go on as its format wants" in error.details()


def test_counts_are_judged_before_what_is_counted_is_looked_at(service: tuple[str, int]) -> None:
    many = completion_request("x", max_tokens=8)
    many.stop.extend([""] * 50_000)
    error = _refused(service[0], many)
    assert "has 50000 texts; at most 16" in error.details()
    huge = completion_request("x", max_tokens=8)
    huge.stop.extend([""] * 1_900_000)
    with _others_go_on(service[0]):
        error = _refused(service[0], huge)
    assert "no valid one has more than" in error.details()


def test_large_texts_are_worked_on_while_others_go_on(service: tuple[str, int]) -> None:
    text = "\n" * 467_000
    with _others_go_on(service[0]), Client(service[0]) as client:
        ids = client.tokenize(text)
        assert ids == TOKENIZER.encode(text)
        assert client.count_tokens(text) == len(ids)
        assert client.detokenize(ids) == TOKENIZER.decode(ids)
    with Client(service[0]) as client, pytest.raises(grpc.RpcError) as raised:
        client.detokenize([5] * 10_000 + [5000])
    error: Any = raised.value
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "has token 5000; the vocabulary has 2048" in error.details()


def test_pings_are_no_reason_to_end_a_call(service: tuple[str, int]) -> None:
    options = [
        ("grpc.keepalive_time_ms", 1000), ("grpc.keepalive_timeout_ms", 20_000), ("grpc.http2.max_pings_without_data", 0),
    ]  # fmt: skip
    with grpc.insecure_channel(service[0], options=options) as channel:
        stub: Any = health_pb2_grpc.HealthStub(channel)
        watch = stub.Watch(health_pb2.HealthCheckRequest(), timeout=6)
        with pytest.raises(grpc.RpcError) as raised:
            list(watch)
    error: Any = raised.value
    assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED


def test_calls_that_want_no_key_are_bounded(service: tuple[str, int]) -> None:
    with grpc.insecure_channel(service[0]) as channel:
        stub: Any = health_pb2_grpc.HealthStub(channel)
        watches = [stub.Watch(health_pb2.HealthCheckRequest(), timeout=60) for _ in range(MOST_OPEN)]
        for watch in watches:
            next(watch)
        with pytest.raises(grpc.RpcError) as raised:
            next(stub.Watch(health_pb2.HealthCheckRequest(), timeout=60))
        error: Any = raised.value
        assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        with Client(service[0]) as client:
            assert client.complete("x", max_tokens=2).finish_reason == "length"
        for watch in watches:
            watch.cancel()


def test_without_a_key_a_message_is_not_even_received(tmp_path: pathlib.Path) -> None:
    """Strangers begin messages of four megabytes that they never end; a client that has a key is answered meanwhile."""
    path = tmp_path / "keys.yaml"
    key, line = new_key("alice")
    path.write_text(line)
    with serving(0.0, path) as (address, pid), contextlib.ExitStack() as strangers:
        before = resident(pid)
        for _ in range(4):
            strangers.enter_context(_unfinished(address, 50))
        time.sleep(2)
        with Client(address, api_key=key) as client:
            assert client.complete("x", max_tokens=2).finish_reason == "length"
        assert resident(pid) - before < 100, "200 messages of 4 MiB would take 800"


@contextlib.contextmanager
def _unfinished(address: str, count: int) -> Iterator[None]:
    """A connection with so many calls, each of which has sent all of its message but the end."""
    host, port = address.split(":")
    with socket.create_connection((host, int(port))) as stranger:
        stranger.settimeout(0.5)
        stranger.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + _frame(4, 0, 0, b""))
        path = b"/grok.serving.v1.GenerationService/Tokenize"
        headers = b"\x83\x86" + b"\x44" + bytes([len(path)]) + path + b"\x41\x01x"
        headers += b"\x40\x0ccontent-type\x10application/grpc\x40\x02te\x08trailers"
        with contextlib.suppress(OSError):  # it need not listen to all of it
            for i in range(count):
                stranger.sendall(_frame(1, 4, 2 * i + 1, headers))
                stranger.sendall(_frame(0, 0, 2 * i + 1, b"\0" + (4 << 20).to_bytes(4, "big") + b"x" * 16_000))
                for _ in range(3):
                    stranger.sendall(_frame(0, 0, 2 * i + 1, b"x" * 16_000))
        yield


def _frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    return len(payload).to_bytes(3, "big") + bytes([kind, flags]) + stream.to_bytes(4, "big") + payload


def test_a_key_pays_once_for_what_is_computed(tmp_path: pathlib.Path) -> None:
    """100 tokens a minute: what would go over is told by when there are more."""

    def budget(name: str) -> str:
        key, line = new_key(name)
        digest = line.split()[1]
        lines.append(f"{name}: {{sha256: {digest}, tokens_per_minute: 6000, max_requests: 4}}")
        return key

    lines: list[str] = []
    resuming, several = budget("resuming"), budget("several")
    (tmp_path / "keys.yaml").write_text("\n".join(lines))
    with serving(0.0, tmp_path / "keys.yaml") as (address, _):
        resumed = completion_request([7], max_tokens=401, seed=1)
        resumed.resume.ids.extend([300] * 400)
        with grpc.insecure_channel(address) as channel:
            stub = generation_pb2_grpc.GenerationServiceStub(channel)
            metadata = (("authorization", f"Bearer {resuming}"),)
            error: Any = None
            for answered in range(100):
                resumed.tokens.ids[0] = 10 + answered  # of which the cache knows nothing
                try:
                    stub.GenerateOnce(generation_pb2.GenerateOnceRequest(completion=resumed), metadata=metadata)
                except grpc.RpcError as turned_away:
                    error = turned_away
                    break
        assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "this key has 6000 tokens a minute" in error.details()
        assert answered <= 30, "each computes 401 positions"
        with Client(address, api_key=several, attempts=1) as client:
            with pytest.raises(grpc.RpcError) as raised:
                client.complete("x", max_tokens=2, n=8)
            error = raised.value
            assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
            assert "is 8; at most 4 completions at once" in error.details()
            assert len(client.complete([9] * 300, max_tokens=2, n=4).others) == 3


def test_schemas_that_are_large_but_can_be_followed_are_taken(service: tuple[str, int]) -> None:
    schema = json.dumps({"type": "object", "properties": {f"p{i:03d}": {} for i in range(499)}})
    error = _refused(service[0], completion_request("x", max_tokens=8, json_schema=schema))
    assert error.code() is grpc.StatusCode.FAILED_PRECONDITION, "only the played mesh does not follow it"
