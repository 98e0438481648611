"""The whole house, for real: two hosts, one mesh, a gateway, and clients of all kinds."""

from __future__ import annotations

import asyncio
import json
import math
import os
import pathlib
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from grpc_status import rpc_status

from cluster.cli import main
from grok.serving.v1 import cluster_pb2, generation_pb2, generation_pb2_grpc
from grokmesh import AsyncClient, Client, Completion, Options, completion_request
from tests.conftest import DEMO
from tests.support.http_calls import call
from tests.support.ports import free_port
from tests.support.service import Service, has_ended, read_metrics, running
from tests.support.waiting import wait_until
from tools.load import cases, run
from workers.checkpoint.checkpoint import open_checkpoint

PROMPT = "And it came to pass"
METHOD = "/grok.serving.v1.GenerationService/"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """Where the service keeps its files."""
    return tmp_path_factory.mktemp("service")


@pytest.fixture(scope="module")
def http_address() -> str:
    """Where the service has its HTTP interface."""
    return f"127.0.0.1:{free_port('127.0.0.1')}"


@pytest.fixture(scope="module")
def service(folder: pathlib.Path, http_address: str) -> Iterator[Service]:
    """The demo: two hosts of two devices. The leaders log their plans."""
    mesh = {"hosts": 2, "devices_per_host": 2, "data": 2, "model": 2}
    telemetry = {"address": f"127.0.0.1:{free_port('127.0.0.1')}", "plan_log": str(folder / "plans")}
    gateway, own = {"http_address": http_address}, {"compilation_cache": str(folder / "xla")}
    with running(folder, mesh=mesh, telemetry=telemetry, gateway=gateway, cluster=own) as service:
        yield service


@pytest.fixture
def client(service: Service) -> Iterator[Client]:
    """A client of it."""
    with Client(service.address) as client:
        yield client


def _idle(status: cluster_pb2.GetStatusResponse) -> bool:
    return status.requests == 0 and all(r.running + r.waiting + r.pages_used == 0 for r in status.replicas)


def _details(error: Any) -> dict[str, Any]:
    """The details of an error by type."""
    found: dict[str, Any] = {}
    status = rpc_status.from_call(error)
    for kind in (error_details_pb2.ErrorInfo, error_details_pb2.BadRequest, error_details_pb2.RetryInfo):
        for detail in status.details if status else ():
            message = kind()
            if detail.Unpack(message):
                found[kind.__name__] = message
    return found


def test_hosts_form_one_mesh_and_read_half_of_the_checkpoint_each(service: Service) -> None:
    (replica,) = service.status().replicas
    assert replica.state == cluster_pb2.REPLICA_STATE_READY
    assert (replica.epoch, replica.mesh_data, replica.mesh_model) == (1, 2, 2)
    assert [(host.rank, host.devices) for host in replica.hosts] == [(0, 2), (1, 2)]
    total = open_checkpoint(DEMO).nbytes
    for host in replica.hosts:
        assert 0.5 * total <= host.bytes_read <= 0.52 * total
        assert os.getpriority(os.PRIO_PROCESS, host.pid) == 0, (
            "Ray's own would leave it what others of the host do not want"
        )


def test_one_process_computes_the_tokens_of_a_plan_log_again(client: Client, folder: pathlib.Path) -> None:
    client.complete(PROMPT, max_tokens=20, seed=5, n=3)
    (log,) = (folder / "plans").iterdir()
    done = subprocess.run([sys.executable, "-P", "-m", "tools.replay", str(log)], capture_output=True, text=True)
    assert re.match(r"\d\d+ plans came to the same tokens", done.stdout), done.stdout + done.stderr
    assert done.returncode == 0


def test_health_and_reflection_answer(service: Service) -> None:
    with grpc.insecure_channel(service.address) as channel:
        health: Any = health_pb2_grpc.HealthStub(channel)
        for name in ("", "grok.serving.v1.GenerationService"):
            answer = health.Check(health_pb2.HealthCheckRequest(service=name))
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
        reflection: Any = reflection_pb2_grpc.ServerReflectionStub(channel)
        request = reflection_pb2.ServerReflectionRequest(list_services="")
        (response,) = reflection.ServerReflectionInfo(iter([request]))
        names = {found.name for found in response.list_services_response.service}
        assert {"grok.serving.v1.GenerationService", "grok.serving.v1.ClusterService", "grpc.health.v1.Health"} <= names


def test_a_stream_tells_what_the_unary_call_tells(client: Client) -> None:
    parts = list(client.generate(PROMPT, max_tokens=20, seed=5, top_logprobs=3))
    whole = client.complete(PROMPT, max_tokens=20, seed=5, top_logprobs=3)
    assert "".join(part.text for part in parts) == whole.text
    assert tuple(token for part in parts for token in part.tokens) == whole.tokens
    assert [part.finish_reason for part in parts] == [None] * (len(parts) - 1) + [whole.finish_reason]
    assert len(whole.tokens) == 20
    assert whole.seed == 5
    first = next(client.generate(PROMPT, max_tokens=200, seed=5))
    assert first.finish_reason is None, "tokens are streamed as they come, however many come at once"
    for token in whole.tokens:
        assert len(token.top) == 3
        assert token.top[0][1] >= token.logprob
        assert token.logprob < 0


def test_http_tells_what_grpc_tells(http_address: str, client: Client) -> None:
    alone = client.complete(PROMPT, max_tokens=24, temperature=1.0, seed=11, top_logprobs=2, ignore_eos=True)
    asked = {
        "model": client.model().name,
        "prompt": PROMPT,
        "max_tokens": 24,
        "seed": 11,
        "logprobs": 2,
        "ignore_eos": True,
    }
    (choice,) = call(http_address, "/v1/completions", asked)[2]["choices"]
    assert (choice["text"], choice["finish_reason"]) == (alone.text, "length")
    assert choice["logprobs"]["token_logprobs"] == [pytest.approx(token.logprob) for token in alone.tokens]
    assert all(len(top) == 2 for top in choice["logprobs"]["top_logprobs"])
    chunks = call(http_address, "/v1/completions", {**asked, "stream": True})[2]
    assert "".join(one["text"] for chunk in chunks for one in chunk["choices"]) == alone.text
    schema = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"], "additionalProperties": False}
    formed = call(
        http_address, "/v1/completions", {**asked, "ignore_eos": False, "structured_outputs": {"json": schema}}
    )
    assert json.loads(formed[2]["choices"][0]["text"])["a"] in (1, 2)
    status, _, body = call(
        http_address, "/v1/chat/completions", {"model": asked["model"], "messages": [{"role": "user", "content": "x"}]}
    )
    assert (status, body["error"]["code"]) == (400, "no_chat_template")


def test_text_and_tokens_are_the_same_prompt(client: Client) -> None:
    ids = client.tokenize(PROMPT)
    assert client.count_tokens(PROMPT) == len(ids)
    assert client.detokenize(ids) == PROMPT
    by_text, by_tokens = (client.complete(prompt, max_tokens=8, temperature=0) for prompt in (PROMPT, ids))
    assert by_text.text == by_tokens.text
    assert by_text.prompt_tokens == len(ids)


def test_what_was_drawn_is_scored_as_it_was_drawn(client: Client, http_address: str) -> None:
    drawn = client.complete(PROMPT, max_tokens=40, seed=4, top_logprobs=2, ignore_eos=True)
    prompt = client.tokenize(PROMPT)
    texts = client.score(prompt, [[token.id for token in drawn.tokens[:end]] for end in (40, 10)], top_logprobs=2)
    for text in texts:
        assert text.first == len(prompt)
        expected = [(token.id, token.logprob, token.top) for token in drawn.tokens[: len(text.tokens)]]
        assert [(token.id, token.logprob, token.top) for token in text.tokens] == expected
        assert all((token.rank == 1) == (token.id == token.top[0][0]) for token in text.tokens)
    assert len(texts[0].tokens) == 40
    (whole,) = client.score(PROMPT)
    asked = {"model": "demo", "prompt": PROMPT, "max_tokens": 0, "echo": True, "logprobs": 0}
    (choice,) = call(http_address, "/v1/completions", asked)[2]["choices"]
    assert choice["logprobs"]["token_logprobs"] == [token.logprob for token in whole.tokens]


def test_the_model_is_described(client: Client) -> None:
    model = client.model()
    assert (model.name, model.context_length, model.vocab_size, model.num_experts) == ("demo", 512, 2048, 8)


def test_masks_and_stop_texts_hold(client: Client) -> None:
    allowed = client.tokenize(" the Lord")
    drawn = client.complete(PROMPT, max_tokens=12, allowed_tokens=allowed)
    assert {token.id for token in drawn.tokens} <= set(allowed)
    free = client.complete(PROMPT, max_tokens=30, temperature=0)
    stop = free.text[10:14]
    stopped = client.complete(PROMPT, max_tokens=30, temperature=0, stop=[stop])
    assert stopped.finish_reason == "stop"
    assert stopped.text == free.text[: free.text.index(stop)]


SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 99},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}


def test_completions_have_the_form_that_was_asked_for_and_others_beside_them_are_free(service: Service) -> None:
    async def ask() -> list[Completion]:
        async with AsyncClient(service.address) as client:
            forms: list[Options] = [{"json_schema": json.dumps(SCHEMA)}, {"regex": "[a-f]{3}-[0-9]{2}"}, {}]
            forms.append({"choice": ["yes", "no", "perhaps"]})
            requests: list[Options] = []
            for seed in range(3):
                for form in forms:
                    options = form.copy()
                    options.update({"seed": seed, "max_tokens": 60})
                    requests.append(options)
            return await asyncio.gather(*(client.complete(PROMPT, **options) for options in requests))

    completions = asyncio.run(ask())
    for i in range(0, 12, 4):
        person = json.loads(completions[i].text)
        assert set(person) == {"name", "age"}
        assert 0 <= person["age"] <= 99
        assert re.fullmatch("[a-f]{3}-[0-9]{2}", completions[i + 1].text)
        assert completions[i + 3].text in ("yes", "no", "perhaps")
        assert completions[i].finish_reason == completions[i + 1].finish_reason == "eos"
    with Client(service.address) as client:
        alone = client.complete(PROMPT, seed=1, max_tokens=60)
    assert alone.tokens == completions[6].tokens


def test_grammars_tags_and_what_must_not_come_are_kept(client: Client) -> None:
    options: Options = {"max_tokens": 80, "temperature": 1.0, "seed": 11}
    nested = client.complete(PROMPT, **(options | {"grammar": 'start: "(" start ")" | "x"'})).text
    assert re.fullmatch(r"\(*x\)*", nested)
    assert nested.count("(") == nested.count(")")
    found = client.complete(PROMPT, **(options | {"json_object": True}))
    assert found.text.startswith("{")
    assert found.finish_reason == "length" or isinstance(json.loads(found.text), dict)
    tag = {"trigger": ",", "begin": ",<", "json_schema": '{"const": 7}', "end": ">"}
    texts = [client.complete(PROMPT, **(options | {"structural_tags": [tag], "seed": s})).text for s in range(4)]
    text = "".join(texts)
    assert "," in text
    assert len(re.findall(r",<7>", text)) >= text.count(",") - 4  # of each the last may have been cut
    plain = client.complete(PROMPT, **options).text
    without = client.complete(PROMPT, **(options | {"bad_words": ["the", "e "]})).text
    assert "the" in plain
    assert "the" not in without
    assert "e " not in without


def test_usage_comes_with_every_part_that_asks_for_it(client: Client) -> None:
    parts = list(client.generate(PROMPT, max_tokens=8, usage_in_parts=True))
    assert {part.prompt_tokens for part in parts} == {parts[-1].prompt_tokens} != {0}
    assert not any(part.prompt_tokens for part in list(client.generate(PROMPT, max_tokens=8))[:-1])


def test_several_completions_of_a_prompt_are_those_of_the_seeds_that_follow(client: Client) -> None:
    options: Options = {"max_tokens": 12, "temperature": 1.2}
    three: Options = {"max_tokens": 12, "temperature": 1.2, "seed": 2**64 - 2, "n": 3}
    alone = [client.complete(PROMPT, **(options | {"seed": seed})) for seed in (2**64 - 2, 2**64 - 1, 0)]
    whole = client.complete(PROMPT, **three)
    assert [c.tokens for c in (whole, *whole.others)] == [c.tokens for c in alone]
    texts, reasons = ["", "", ""], [""] * 3
    for part in client.generate(PROMPT, **three):
        texts[part.index] += part.text
        reasons[part.index] = part.finish_reason or ""
    assert texts == [c.text for c in alone]
    assert reasons == [c.finish_reason for c in alone]


def test_a_prompt_that_came_before_is_found_in_the_cache(service: Service, client: Client) -> None:
    prompt = list(range(300, 400))
    first = client.complete(prompt, max_tokens=8, seed=3)
    url = service.status().replicas[0].hosts[0].metrics_url
    name = 'grokmesh_engine_prefix_tokens_total{result="hit"}'
    before = read_metrics(url)[name]
    again = client.complete(prompt, max_tokens=8, seed=3)
    assert again.tokens == first.tokens
    assert read_metrics(url)[name] - before == again.cached_prompt_tokens == 96  # full pages of 16
    assert first.cached_prompt_tokens == 0
    salted = [client.complete(prompt, max_tokens=8, seed=3, cache_salt=salt) for salt in ("a", "b", "a")]
    assert [one.cached_prompt_tokens for one in salted] == [0, 0, 96]
    assert {one.tokens for one in salted} == {first.tokens}


def test_penalties_keep_a_completion_from_repeating_itself(client: Client) -> None:
    options: Options = {"max_tokens": 60, "temperature": 0.0, "ignore_eos": True}
    plain = client.complete(PROMPT, **options)
    options.update({"presence_penalty": 2.0, "frequency_penalty": 2.0, "repetition_penalty": 2.0})
    held = client.complete(PROMPT, **options)
    assert len({t.id for t in held.tokens}) > len({t.id for t in plain.tokens})


def test_every_rank_keeps_what_it_compiled(service: Service, folder: pathlib.Path) -> None:
    kept = [{file.name.split("-")[0] for file in (folder / "xla" / f"rank{rank}").iterdir()} for rank in range(2)]
    assert kept[0]
    assert kept[0] == kept[1]


def test_a_load_is_sent_and_reported(
    service: Service, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = [
        "bench",
        "serve",
        "--address",
        service.address,
        "--prompt",
        "8:40",
        "--completion",
        "2:9",
        "--output",
        str(tmp_path),
    ]
    assert main([*base, "--requests", "12", "--clients", "4"]) == 0
    shown = capsys.readouterr().out
    assert "12 requests" in shown
    summary = json.loads((tmp_path / "bench.json").read_text())["summary"]
    assert summary["time_to_first_token"]["p50"] > 0
    assert summary["errors"] == {}
    assert (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG")
    assert main([*base, "--requests", "6", "--rate", "20", "--ramp", "0.2", "--shared-prefix", "16"]) == 0


def test_the_async_client_does_the_same(service: Service, client: Client) -> None:
    async def ask() -> tuple[str, str]:
        async with AsyncClient(service.address) as other:
            parts = [part.text async for part in other.generate(PROMPT, max_tokens=8, temperature=0)]
            return "".join(parts), (await other.complete(PROMPT, max_tokens=8, temperature=0)).text

    assert set(asyncio.run(ask())) == {client.complete(PROMPT, max_tokens=8, temperature=0).text}


def test_the_command_line_talks_to_it(service: Service, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--address", service.address]
    assert main(["generate", PROMPT, *arguments, "--max-tokens", "5", "--temperature", "0"]) == 0
    assert "5 tokens at" in capsys.readouterr().err
    assert main(["status", *arguments]) == 0
    assert "replica 0: ready, epoch 1, mesh 2 x 2" in capsys.readouterr().out
    assert main(["score", PROMPT, " unto him", " cheese", *arguments]) == 0
    lines = capsys.readouterr().out.splitlines()
    likely, unlikely = (float(line.split()[0]) for line in lines if line.endswith(("' unto him'", "' cheese'")))
    assert 0 > likely > unlikely
    assert main(["generate", PROMPT, *arguments, "--top-p", "2"]) == 1
    assert "INVALID_ARGUMENT: completion.sampling.top_p: is 2" in capsys.readouterr().err


WRONG: dict[str, tuple[str, dict[str, Any], str]] = {
    "empty prompt": ("", {}, "completion.text"),
    "too long prompt": ("word " * 600, {}, "completion.text"),
    "NaN temperature": (PROMPT, {"temperature": math.nan}, "completion.sampling.temperature"),
    "top_p 0": (PROMPT, {"top_p": 0.0}, "completion.sampling.top_p"),
    "top_p 1.5": (PROMPT, {"top_p": 1.5}, "completion.sampling.top_p"),
    "negative max_tokens": (PROMPT, {"max_tokens": -1}, "completion.max_tokens"),
}


@pytest.mark.parametrize("streamed", [True, False])
@pytest.mark.parametrize("name", WRONG)
def test_wrong_requests_get_the_wrong_field(client: Client, name: str, streamed: bool) -> None:
    prompt, options, field = WRONG[name]
    with pytest.raises(grpc.RpcError) as raised:
        list(client.generate(prompt, **options)) if streamed else client.complete(prompt, **options)
    error: Any = raised.value
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert field in error.details()
    details = _details(error)
    assert details["ErrorInfo"].domain == "grokmesh"
    assert [violation.field for violation in details["BadRequest"].field_violations] == [field]


def _raw(service: Service, method: str, message: bytes) -> bytes:
    with grpc.insecure_channel(service.address, options=[("grpc.max_send_message_length", -1)]) as channel:
        call: Any = channel.unary_unary(METHOD + method, request_serializer=None, response_deserializer=None)
        answer: bytes = call(message, timeout=20)
        return answer


@pytest.mark.parametrize(
    ("message", "code"),
    [
        (b"\xff\xff\xff\xff", grpc.StatusCode.INVALID_ARGUMENT),
        (b"\x0a\x05abc", grpc.StatusCode.INVALID_ARGUMENT),
        (b"", grpc.StatusCode.INVALID_ARGUMENT),
        (
            generation_pb2.GenerateOnceRequest(completion=completion_request("x" * 10_000_000)).SerializeToString(),
            grpc.StatusCode.RESOURCE_EXHAUSTED,
        ),
    ],
    ids=["garbage", "cut short", "nothing", "10 MB"],
)
def test_malformed_messages_get_an_error_and_do_no_harm(
    service: Service, client: Client, message: bytes, code: grpc.StatusCode
) -> None:
    with pytest.raises(grpc.RpcError) as raised:
        _raw(service, "GenerateOnce", message)
    error: Any = raised.value
    assert error.code() is code
    assert error.details()
    assert client.complete(PROMPT, max_tokens=2).text is not None


def test_unknown_fields_are_ignored(service: Service) -> None:
    known = generation_pb2.GenerateOnceRequest(completion=completion_request(PROMPT, max_tokens=2, temperature=0))
    answer = _raw(service, "GenerateOnce", known.SerializeToString() + b"\xfa\x3f\x03abc")
    assert len(generation_pb2.GenerateOnceResponse.FromString(answer).tokens) == 2


def test_an_unknown_method_is_unimplemented(service: Service) -> None:
    with pytest.raises(grpc.RpcError) as raised:
        _raw(service, "Destroy", b"")
    error: Any = raised.value
    assert error.code() is grpc.StatusCode.UNIMPLEMENTED


def test_cancellation_frees_slot_and_pages(service: Service) -> None:
    with grpc.insecure_channel(service.address) as channel:
        stub = generation_pb2_grpc.GenerationServiceStub(channel)
        completion = completion_request(PROMPT, max_tokens=400, ignore_eos=True)
        call: Any = stub.Generate(generation_pb2.GenerateRequest(completion=completion))
        next(call)
        assert service.status().replicas[0].running == 1
        call.cancel()
        service.wait_for(_idle, seconds=2)


def test_a_completion_is_cancelled_by_its_name(service: Service, client: Client) -> None:
    streams = [client.generate(PROMPT, max_tokens=400, ignore_eos=True, n=2) for _ in range(2)]
    name = next(streams[0]).request_id.removesuffix("-1")  # of whichever of the two this is a part
    next(streams[1])
    (load,) = client.load().replicas
    assert (load.running, load.pages_used > 0, load.pages_total) == (4, True, service.status().replicas[0].pages_total)
    client.cancel(name)
    with pytest.raises(grpc.RpcError) as raised:
        list(streams[0])
    assert raised.value.code() is grpc.StatusCode.ABORTED
    assert len([part for part in streams[1] if part.finish_reason]) == 2
    service.wait_for(_idle, seconds=5)


def test_a_deadline_frees_slot_and_pages(service: Service, client: Client) -> None:
    with pytest.raises(grpc.RpcError) as raised:
        client.complete(PROMPT, max_tokens=400, ignore_eos=True, timeout=0.5)
    error: Any = raised.value
    assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    service.wait_for(_idle, seconds=2)
    counted = read_metrics(service.status().metrics_url)
    assert counted['grokmesh_gateway_requests_total{code="DEADLINE_EXCEEDED",method="GenerateOnce"}'] > 0


def test_under_load_each_request_gets_what_it_gets_alone(service: Service) -> None:
    result = asyncio.run(run(service.address, clients=16, load=cases(48, longest=12, seed=1)))
    assert result.wrong == 0
    assert _idle(result.status)
    assert result.status.replicas[0].compilations == 0


def test_every_metric_moves(service: Service, client: Client) -> None:
    client.complete(PROMPT, max_tokens=8, ignore_eos=True)
    client.score(PROMPT)
    status = service.status()
    gateway = read_metrics(status.metrics_url)
    assert gateway['grokmesh_gateway_requests_total{code="OK",method="GenerateOnce"}'] > 0
    labels = '{gen_ai_operation_name="text_completion",gen_ai_request_model="demo"}'
    assert gateway[f"gen_ai_server_time_to_first_token_seconds_count{labels}"] > 0
    assert gateway[f"gen_ai_server_time_per_output_token_seconds_sum{labels}"] > 0
    assert gateway['grokmesh_gateway_tokens_total{key="anonymous",kind="completion"}'] >= 8
    controller = read_metrics(status.controller_metrics_url)
    assert controller["grokmesh_replicas_ready"] == controller["grokmesh_replicas_wanted"] == 1
    assert controller['grokmesh_replica_epoch{replica="0"}'] == status.replicas[0].epoch
    leader, follower = (read_metrics(host.metrics_url) for host in status.replicas[0].hosts)
    assert leader["grokmesh_engine_generated_tokens_total"] >= 8
    assert leader["grokmesh_engine_scored_tokens_total"] >= 4
    assert leader["grokmesh_engine_kv_pages"] == status.replicas[0].pages_total > 0
    assert leader["grokmesh_engine_step_seconds_count"] > 0
    assert leader["grokmesh_worker_plans_total"] == follower["grokmesh_worker_plans_total"] > 0
    for worker in (leader, follower):
        assert worker["grokmesh_worker_epoch"] == status.replicas[0].epoch
        assert worker["grokmesh_worker_compilations_total"] > 0
        assert worker["grokmesh_worker_checkpoint_read_bytes_total"] == status.replicas[0].hosts[0].bytes_read


@pytest.mark.parametrize(
    ("rank", "fault"),
    [(1, signal.SIGKILL), (0, signal.SIGKILL), (1, signal.SIGSTOP)],
    ids=["follower dies", "leader dies", "follower hangs"],
)
def test_a_host_may_fail_in_mid_stream_and_the_client_never_knows(
    service: Service, client: Client, folder: pathlib.Path, rank: int, fault: signal.Signals
) -> None:
    compiled = set((folder / "xla").rglob("*"))
    options: dict[str, Any] = {"max_tokens": 450, "ignore_eos": True, "temperature": 1.0, "seed": 3, "top_logprobs": 3}
    whole = client.complete(PROMPT, **options)
    stop = whole.text[600:606]  # of several tokens, somewhere after the break
    expected = [whole, client.complete(PROMPT, **options, stop=[stop])]
    replica = service.status().replicas[0]
    seen: list[list[Completion]] = [[], []]

    def stream(parts: list[Completion], **more: Any) -> None:
        with Client(service.address, attempts=1) as other:
            parts.extend(other.generate(PROMPT, **options, **more))

    threads = [
        threading.Thread(target=stream, args=(seen[0],)),
        threading.Thread(target=stream, args=(seen[1],), kwargs={"stop": [stop]}),
    ]
    for thread in threads:
        thread.start()
    wait_until(lambda: all(seen), 10)
    os.kill(replica.hosts[rank].pid, fault)
    service.wait_for(lambda status: has_ended(replica, status.replicas[0]), seconds=10)
    late = client.complete(PROMPT, **{**options, "max_tokens": 3})  # who comes now waits
    assert late.tokens == whole.tokens[:3]
    for thread in threads:
        thread.join(timeout=60)
    for parts, want in zip(seen, expected, strict=True):
        assert "".join(part.text for part in parts) == want.text
        assert tuple(token for part in parts for token in part.tokens) == want.tokens
        assert parts[-1].finish_reason == want.finish_reason
    now = service.status().replicas[0]
    assert now.epoch > replica.epoch
    assert now.last_failure
    assert set((folder / "xla").rglob("*")) == compiled, "nothing was compiled anew"


def test_two_replicas_of_one_host_share_the_work(tmp_path: pathlib.Path) -> None:
    mesh = {"hosts": 1, "devices_per_host": 1, "data": 1, "model": 1}
    with running(tmp_path, mesh=mesh, replicas=2) as service, Client(service.address) as client:

        def both(status: cluster_pb2.GetStatusResponse) -> bool:
            return [gateway.replicas for gateway in status.gateways] == [2]

        service.wait_for(both, seconds=60)
        for _ in range(10):  # one of them may be late for a moment, and is then passed over
            streams = [client.generate(PROMPT, max_tokens=450, seed=1, ignore_eos=True) for _ in range(2)]
            begun = [next(stream) for stream in streams]
            running_now = [replica.running for replica in service.status().replicas]
            if running_now == [1, 1]:
                break
            assert [list(stream)[-1].finish_reason for stream in streams] == ["length", "length"]
        assert running_now == [1, 1]
        os.kill(service.status().replicas[0].hosts[0].pid, signal.SIGKILL)
        first, second = (
            [token for part in (part, *stream) for token in part.tokens]
            for part, stream in zip(begun, streams, strict=True)
        )
        assert first == second  # the other replica went on with what was lost
        assert client.complete(PROMPT, max_tokens=5).tokens
        service.wait_for(lambda status: both(status) and status.replicas[0].epoch == 2, seconds=60)
