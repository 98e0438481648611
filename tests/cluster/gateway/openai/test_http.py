"""What HTTP's clients get is what gRPC's get, in OpenAI's form; and what is wrong is named."""

from __future__ import annotations

import contextlib
import dataclasses
import http.client
import json
import pathlib
import socket
import time
from collections.abc import Iterator
from typing import Any

import pytest

from cluster.gateway.auth.api_keys import new_key
from cluster.gateway.openai.server import HEAD_SECONDS
from grokmesh import Client
from tests.support.fake_service import SHAPE, serving
from tests.support.http_calls import call
from tests.support.ports import free_port
from tests.support.waiting import wait_until


@dataclasses.dataclass(frozen=True)
class _Service:
    address: str
    grpc: str
    key: str = ""

    def connect(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection(self.address, timeout=30)

    def call(self, path: str, body: object = None, **headers: str) -> tuple[int, dict[str, str], Any]:
        return call(self.address, path, body, **headers)

    def complete(self, **fields: object) -> Any:
        status, _, body = self.call("/v1/completions", {"model": "demo", "prompt": "And it came", **fields})
        assert status == 200, body
        return body

    def chat(self, **fields: object) -> Any:
        messages = [{"role": "user", "content": "Who goes?"}]
        status, _, body = self.call("/v1/chat/completions", {"model": "demo", "messages": messages, **fields})
        assert status == 200, body
        return body

    def count(self, text: str) -> int:
        return int(self.call("/tokenize", {"prompt": text})[2]["count"])

    def refused(self, path: str, **fields: object) -> tuple[int, Any]:
        """Status and error of a request that is not answered."""
        status, _, body = self.call(path, {"model": "demo", **fields})
        assert status >= 400, body
        return status, body["error"]


@contextlib.contextmanager
def _running(seconds: float = 0.01, keys: pathlib.Path | None = None, key: str = "") -> Iterator[_Service]:
    address = f"127.0.0.1:{free_port('127.0.0.1')}"
    with serving(seconds, keys, http_address=address) as (grpc, _):
        yield _Service(address, grpc, key)


@pytest.fixture(scope="module")
def service() -> Iterator[_Service]:
    with _running() as running:
        yield running


def test_a_completion_is_grpcs(service: _Service) -> None:
    with Client(service.grpc) as client:
        alone = client.complete("And it came", max_tokens=20, seed=7, ignore_eos=True)
    body = service.complete(max_tokens=20, seed=7, ignore_eos=True)
    assert body["object"] == "text_completion"
    assert body["choices"] == [{"index": 0, "text": alone.text, "logprobs": None, "finish_reason": "length"}]
    usage = {"prompt_tokens": service.count("And it came"), "completion_tokens": 20}
    total = {"total_tokens": sum(usage.values()), "prompt_tokens_details": {"cached_tokens": 0}}
    assert body["usage"] == usage | total


def test_streams_come_to_what_whole_answers_are(service: _Service) -> None:
    fields = {
        "prompt": ["And it came", "x"],
        "n": 2,
        "max_tokens": 9,
        "seed": 3,
        "echo": True,
        "ignore_eos": True,
    }
    whole = service.complete(**fields)
    texts = [""] * 4
    *chunks, last = service.complete(**fields, stream=True, stream_options={"include_usage": True})
    for chunk in chunks:
        assert chunk["usage"] is None
        for choice in chunk["choices"]:
            texts[choice["index"]] += choice["text"]
    assert texts == [choice["text"] for choice in whole["choices"]]
    assert texts[0].startswith("And it came")
    assert (last["choices"], last["usage"]) == ([], whole["usage"])
    assert whole["usage"]["completion_tokens"] == 36


def test_usage_comes_with_every_chunk_that_asks_for_it(service: _Service) -> None:
    counted = {"continuous_usage_stats": True}
    chunks = service.complete(max_tokens=5, ignore_eos=True, stream=True, stream_options=counted)
    assert [chunk["usage"]["completion_tokens"] for chunk in chunks][-1] == 5
    assert {chunk["usage"]["prompt_tokens"] for chunk in chunks} == {service.count("And it came")}


def test_logprobs_stand_beside_their_tokens(service: _Service) -> None:
    (choice,) = service.complete(max_tokens=5, logprobs=1, ignore_eos=True)["choices"]
    found = choice["logprobs"]
    assert "".join(found["tokens"]) == choice["text"]
    assert [choice["text"][at] for at in found["text_offset"]] == [token[0] for token in found["tokens"]]
    assert len(found["token_logprobs"]) == 5
    (choice,) = service.chat(max_tokens=5, logprobs=True, ignore_eos=True)["choices"]
    assert "".join(one["token"] for one in choice["logprobs"]["content"]) == choice["message"]["content"]


@pytest.mark.parametrize(("drawn", "n"), [(0, 1), (3, 2)])
def test_an_echo_comes_with_the_prompt_s_logprobs(service: _Service, drawn: int, n: int) -> None:
    prompts = ["And it came", "to pass in those days"]
    body = service.complete(prompt=prompts, max_tokens=drawn, logprobs=1, echo=True, n=n, ignore_eos=True)
    assert len(body["choices"]) == 2 * n
    for i, choice in enumerate(body["choices"]):
        found, count = choice["logprobs"], service.count(prompts[i // n])
        assert len(found["tokens"]) == count + drawn
        assert found["token_logprobs"] == [None, *[-2.0] * (count - 1), *[-1.0] * drawn]
        assert found["top_logprobs"][0] is None
        assert [len(top) for top in found["top_logprobs"][1:]] == [1] * (count - 1) + [0] * drawn
        assert (found["text_offset"][0], choice["finish_reason"]) == (0, "length")
        assert choice["text"].startswith(prompts[i // n])
    assert body["usage"]["completion_tokens"] == 2 * n * drawn


def test_a_chat_goes_through_its_template(service: _Service) -> None:
    with Client(service.grpc) as client:
        prompt = "USER: Who goes?\nASSISTANT:"
        alone = client.complete(prompt, max_tokens=8, seed=2, ignore_eos=True)
    body = service.chat(max_completion_tokens=8, seed=2, ignore_eos=True)
    message = {"role": "assistant", "content": alone.text}
    assert [choice["message"] for choice in body["choices"]] == [message]
    assert body["usage"]["prompt_tokens"] == service.count(prompt)
    chunks = service.chat(max_tokens=8, seed=2, ignore_eos=True, stream=True)
    deltas = [choice["delta"] for chunk in chunks for choice in chunk["choices"]]
    assert deltas[0]["role"] == "assistant"
    assert "".join(delta.get("content", "") for delta in deltas) == alone.text
    assert [choice["finish_reason"] for chunk in chunks for choice in chunk["choices"]][-1] == "length"


def test_best_of_returns_as_many_as_are_wanted(service: _Service) -> None:
    body = service.complete(n=1, best_of=3, max_tokens=4, ignore_eos=True)
    assert len(body["choices"]) == 1
    assert body["usage"]["completion_tokens"] == 12


@pytest.mark.parametrize(
    ("fields", "param", "problem"),
    [
        ({"prompt": "x", "temperature": -1}, "temperature", "must be a number from 0 to 100"),
        ({"prompt": "x", "suffix": "y"}, "suffix", "not supported"),
        ({"prompt": "x", "max_tokens": "3"}, "max_tokens", "integer"),
        ({"prompt": ""}, "prompt", "is empty"),
        ({"prompt": []}, "prompt", "is empty"),
        ({"prompt": ["x", [5]]}, "prompt", "string"),
        ({"prompt": ["x"] * 65}, "prompt", "at most 64"),
        ({"prompt": [10**7]}, "prompt", "the vocabulary has"),
        ({"prompt": "x", "echo": True, "logprobs": 1, "stream": True}, "stream", "echo and logprobs"),
        ({"prompt": "x", "best_of": 2, "stream": True}, "best_of", "stream"),
        ({"prompt": "x", "best_of": 1, "n": 2}, "best_of", "n=2"),
        ({"prompt": "x", "n": 0}, "n", "at least 1"),
        ({"prompt": "x", "n": 2, "max_tokens": 0, "echo": True}, "n", "nothing is drawn"),
        ({"prompt": "x", "logit_bias": {"x": 1}}, "logit_bias", "'x'"),
        ({"prompt": "x", "seed": -1}, "seed", "greater than or equal to 0"),
        ({"prompt": "x", "structured_outputs": {}}, "structured_outputs", "one of json, regex, choice"),
        ({}, "prompt", "required"),
    ],
)
def test_what_is_wrong_is_named(service: _Service, fields: dict[str, Any], param: str, problem: str) -> None:
    status, error = service.refused("/v1/completions", **fields)
    assert (status, error["type"], error["param"]) == (400, "invalid_request_error", param)
    assert problem in error["message"]


def test_a_stream_that_is_refused_has_a_status(service: _Service) -> None:
    messages = [{"role": "user", "content": "x"}]
    status, error = service.refused("/v1/chat/completions", messages=messages, max_tokens=10**6, stream=True)
    assert (status, error["param"]) == (400, "max_tokens")


def test_other_models_and_paths_are_not_found(service: _Service) -> None:
    assert service.call("/v1/models")[2]["data"][0]["id"] == "demo"
    assert service.call("/v1/models/demo")[0] == 200
    for found in (service.call("/v1/models/other"), service.call("/v1/completions", {"model": "other", "prompt": "x"})):
        assert (found[0], found[2]["error"]["code"]) == (404, "model_not_found")
    assert service.call("/v2")[0] == 404
    assert service.call("/v1/completions")[0] == 405


def test_what_is_no_json_is_refused(service: _Service) -> None:
    for data in (b"{", b"\xff", b"[" * 100_000, b"null", b'{"model": NaN}'):
        status, _, body = service.call("/v1/completions", data)
        assert (status, body["error"]["type"]) == (400, "invalid_request_error"), data[:10]


def test_a_message_that_no_request_has_is_not_read(service: _Service) -> None:
    with contextlib.closing(service.connect()) as connection:
        connection.putrequest("POST", "/v1/completions")
        connection.putheader("content-length", str(10**12))
        connection.endheaders()
        answer = connection.getresponse()
        assert answer.status == 400
        assert "no valid one has more" in json.loads(answer.read())["error"]["message"]


def test_texts_become_tokens_and_back(service: _Service) -> None:
    found = service.call("/tokenize", {"prompt": "And it came", "add_special_tokens": False})[2]
    assert (found["count"], found["max_model_len"]) == (len(found["tokens"]), SHAPE.context)
    assert service.call("/detokenize", {"tokens": found["tokens"]})[2]["prompt"] == "And it came"
    about = service.call("/tokenizer_info")[2]
    assert (about["eos_token"], about["model_max_length"]) == ("</s>", SHAPE.context)
    assert "messages" in about["chat_template"]


def test_a_completion_is_ended_by_its_name() -> None:
    with _running(seconds=0.1) as service, contextlib.closing(service.connect()) as connection:
        body = {"model": "demo", "prompt": "x", "max_tokens": 400, "ignore_eos": True, "stream": True}
        connection.request("POST", "/v1/completions", json.dumps(body), {"content-type": "application/json"})
        stream = connection.getresponse()
        stream.readline()
        assert service.call("/load")[2]["replicas"][0]["running"] == 1
        assert service.call("/cancel", {"request_id": stream.headers["x-request-id"]})[0] == 200
        *_, last = stream.read().split(b"data: ")
        assert json.loads(last)["error"]["code"] == "cancelled"


def test_a_client_that_leaves_ends_its_completion() -> None:
    """All slots are taken by streams whose clients leave; another completion then has one at once."""
    with _running(seconds=0.1) as service:
        connections = [service.connect() for _ in range(SHAPE.slots)]
        for connection in connections:
            body = {"model": "demo", "prompt": "x", "max_tokens": 400, "ignore_eos": True, "stream": True}
            connection.request("POST", "/v1/completions", json.dumps(body), {"content-type": "application/json"})
            connection.getresponse().readline()
        for connection in connections:
            connection.close()
        began = time.monotonic()
        service.complete(max_tokens=1)
        assert time.monotonic() - began < 20  # their streams would have taken 40


def test_a_call_ends_in_the_time_that_it_is_given(service: _Service) -> None:
    body = {"model": "demo", "prompt": "x", "max_tokens": 400, "ignore_eos": True}
    status, _, answer = service.call("/v1/completions", body, x_request_timeout="0.3")
    assert (status, answer["error"]["code"]) == (504, "deadline")
    status, _, answer = service.call("/v1/completions", {**body, "stream": True}, x_request_timeout="0.5")
    assert (status, answer["error"]["code"]) == (200, "deadline")
    assert service.call("/v1/completions", body, x_request_timeout="soon")[2]["error"]["param"] == "x-request-timeout"


def test_keys_are_those_of_grpc(tmp_path: pathlib.Path) -> None:
    key, line = new_key("somebody")
    file = tmp_path / "keys.yaml"
    file.write_text(f"{line}\n")
    with _running(keys=file) as service:
        assert service.call("/health")[0] == 200
        status, _, body = service.call("/v1/models")
        assert (status, body["error"]["code"]) == (401, "invalid_api_key")
        assert service.call("/v1/models", authorization=f"Bearer {key}")[0] == 200
        # Without a key a message is not even read.
        assert service.call("/v1/completions", b"{" * 1000)[0] == 401


def test_a_connection_over_which_nothing_comes_is_closed(service: _Service) -> None:
    host, port = service.address.split(":")
    with socket.create_connection((host, int(port)), timeout=3 * HEAD_SECONDS) as connection:
        connection.sendall(b"GET /health HT")
        assert connection.recv(1) == b""


def test_health_needs_no_key_and_says_whether_it_serves(service: _Service) -> None:
    wait_until(lambda: service.call("/health")[0] == 200, 10)
