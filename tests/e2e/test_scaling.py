"""Replicas that come and go with the load, and a service that takes over from another, while requests go on."""

from __future__ import annotations

import contextlib
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator

import grpc
import pytest
import yaml

from cluster import daemon
from cluster.config.schema import AutoscalingSection
from cluster.controller.autoscaler import Autoscaler, Signals
from cluster.gateway.auth.api_keys import new_key
from grok.serving.v1 import cluster_pb2, generation_pb2, generation_pb2_grpc
from grokmesh import Client, completion_request
from tests.support.service import START_SECONDS, read_metrics, running
from tests.support.waiting import wait_until

ONE_DEVICE = {"hosts": 1, "devices_per_host": 1, "data": 1, "model": 1}
PROMPT = "And it came to pass"


def _signals(now: float, replicas: int, **values: float) -> Signals:
    base = {"ready": replicas, "sessions": 0, "queued": 0, "slots": 16, "time_to_first_token": 0.0}
    return Signals(now=now, replicas=replicas, **{**base, **values})  # type: ignore[arg-type]


def _autoscaler() -> Autoscaler:
    policy = AutoscalingSection(
        max_replicas=3, queue_per_replica=4, time_to_first_token=2, up_seconds=10, down_seconds=60
    )
    return Autoscaler(policy, fewest=1)


@pytest.mark.parametrize("pressure", [{"queued": 5}, {"time_to_first_token": 2.5, "sessions": 1}])
def test_a_replica_is_added_when_pressure_lasts(pressure: dict[str, float]) -> None:
    scaler = _autoscaler()
    assert [scaler.wanted(_signals(now, 1, **pressure)) for now in (0, 5, 9.9)] == [1, 1, 1]
    assert scaler.wanted(_signals(10, 1, **pressure)) == 2


def test_pressure_that_lets_up_adds_nothing() -> None:
    scaler = _autoscaler()
    for now in range(0, 100, 2):
        assert scaler.wanted(_signals(now, 1, queued=9 if now % 10 else 0, sessions=9)) == 1


def test_nothing_more_is_added_before_the_last_one_serves_nor_beyond_the_most() -> None:
    scaler = _autoscaler()
    assert all(scaler.wanted(_signals(now, 2, ready=1, queued=99)) == 2 for now in range(0, 60, 5))
    assert all(scaler.wanted(_signals(now, 3, queued=99)) == 3 for now in range(60, 120, 5))


def test_a_replica_that_never_comes_is_given_up_when_calm_returns() -> None:
    scaler = _autoscaler()
    assert [scaler.wanted(_signals(now, 2, ready=1)) for now in (0, 59, 60)] == [2, 2, 1]


def test_a_replica_is_taken_away_when_one_fewer_would_do_for_long_enough() -> None:
    scaler = _autoscaler()
    assert [scaler.wanted(_signals(now, 2, sessions=8, time_to_first_token=1.9)) for now in (0, 59)] == [2, 2]
    assert scaler.wanted(_signals(60, 2, sessions=8)) == 1
    scaler = _autoscaler()
    assert all(scaler.wanted(_signals(now, 2, sessions=9)) == 2 for now in range(0, 200, 10)), (
        "half of one's slots is 8"
    )
    assert all(scaler.wanted(_signals(now, 1)) == 1 for now in range(200, 400, 10)), "never below the fewest"


@contextlib.contextmanager
def _autoscaling_cluster() -> Iterator[tuple[str, Callable[[], int]]]:
    """The address of a Ray cluster with an autoscaler, and a way to count its nodes."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.e2e.autoscaling_cluster"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    assert process.stdin is not None
    assert process.stdout is not None
    lines = process.stdout

    def read(name: str) -> str:
        """What the next line of that name says; Ray writes warnings between them."""
        line = next((line for line in lines if line.startswith(name)), "")
        assert line, "the cluster has ended"
        return line.removeprefix(name).strip()

    def nodes() -> int:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
        return int(read("nodes:"))

    try:
        yield read("address:"), nodes
    finally:
        process.stdin.close()
        try:
            process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
        process.stdout.close()


def test_load_adds_a_host_and_calm_takes_it_away(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    policy = {"max_replicas": 2, "queue_per_replica": 1, "up_seconds": 1, "down_seconds": 4}
    with (
        _autoscaling_cluster() as (address, nodes),
        running(
            tmp_path,
            mesh=ONE_DEVICE,
            engine={"slots": 2},
            autoscaling=policy,
            cluster={"address": address, "compilation_cache": str(tmp_path / "xla")},
        ) as service,
    ):
        assert nodes() == 1
        stop = threading.Event()
        failures: list[grpc.RpcError] = []

        def load() -> None:
            with Client(service.address) as client:
                while not stop.is_set():
                    try:
                        client.complete(PROMPT, max_tokens=100, ignore_eos=True)
                    except grpc.RpcError as error:
                        failures.append(error)

        threads = [threading.Thread(target=load, daemon=True) for _ in range(8)]
        for thread in threads:
            thread.start()
        ready = cluster_pb2.REPLICA_STATE_READY
        service.wait_for(lambda status: [r.state for r in status.replicas] == [ready, ready], seconds=90)
        assert nodes() == 2
        service.wait_for(lambda status: all(r.running for r in status.replicas), seconds=10)
        # Six of the eight leave; one replica is enough for the rest, and the other ends when its streams have.
        with Client(service.address) as client:
            long = client.generate(PROMPT, max_tokens=450, ignore_eos=True)
            begun = next(long)
            stop.set()
            tokens = len(begun.tokens) + sum(len(part.tokens) for part in long)
        for thread in threads:
            thread.join()
        assert (tokens, failures) == (450, [])
        service.wait_for(lambda status: [r.state for r in status.replicas] == [ready], seconds=60)
        wait_until(lambda: nodes() == 1, 60, lambda: "Ray keeps a host that nobody uses", pause=0.5)


def test_a_successor_takes_over_and_no_request_fails(tmp_path: pathlib.Path) -> None:
    """The clients here repeat nothing but what gRPC cancels because it meets a server that stops: that has done nothing yet.
    What a key has spent stays spent."""
    (key, line), (spender, spent) = new_key("load"), new_key("spender")
    keys = tmp_path / "keys.yaml"
    keys.write_text(f"{line}\nspender: {{sha256: {spent.split()[1]}, tokens_per_minute: 1}}\n")
    metadata = (("authorization", f"Bearer {key}"),)
    with running(tmp_path, key, mesh=ONE_DEVICE, gateway={"api_keys": str(keys)}) as service:
        stop = threading.Event()
        finished: list[tuple[str, int]] = []
        failures: list[grpc.RpcError] = []

        def load(client_number: int) -> None:
            # Half of the clients keep their connection, half make a new one for each request.
            channel = grpc.insecure_channel(service.address, options=[("grpc.use_local_subchannel_pool", 1)])
            while not stop.is_set():
                if client_number % 2:
                    channel.close()
                    channel = grpc.insecure_channel(service.address, options=[("grpc.use_local_subchannel_pool", 1)])
                stub = generation_pb2_grpc.GenerationServiceStub(channel)
                completion = completion_request(PROMPT, max_tokens=40, ignore_eos=True)
                parts: list[generation_pb2.GenerateResponse] = []
                try:
                    request = generation_pb2.GenerateRequest(completion=completion)
                    parts.extend(stub.Generate(request, metadata=metadata))
                    model = stub.GetModel(generation_pb2.GetModelRequest(), metadata=metadata).name
                    finished.append((model, sum(len(part.tokens) for part in parts)))
                except grpc.RpcError as error:
                    whole = bool(parts) and parts[-1].finish_reason
                    if error.code() is not grpc.StatusCode.CANCELLED or (parts and not whole):
                        failures.append(error)
            channel.close()

        threads = [threading.Thread(target=load, args=(i,), daemon=True) for i in range(6)]
        for thread in threads:
            thread.start()
        with Client(service.address, api_key=spender) as client:
            client.complete(PROMPT, max_tokens=40)
        path = tmp_path / "ray_config.yaml"
        config = yaml.safe_load(path.read_text())
        config["model"]["name"] = "demo-2"
        config["telemetry"]["log_prompts"] = True
        path.write_text(yaml.safe_dump(config))
        log = tmp_path / "successor.log"
        successor = daemon.launch(path, log, detached=False, replace=True)
        try:
            daemon.follow(successor, log, START_SECONDS)
            assert service.process.wait(timeout=60) == 0
            wait_until(lambda: any(model == "demo-2" for model, _ in finished), 10)
            stop.set()
            for thread in threads:
                thread.join()
            assert failures == []
            assert {tokens for _, tokens in finished} == {40}
            models = [model for model, _ in finished]
            assert {"demo", "demo-2"} == set(models)
            assert models[-1] == "demo-2"
            assert f'"prompt": "{PROMPT}"' in log.read_text()
            assert PROMPT not in (tmp_path / "serve.log").read_text()
            assert read_metrics(service.status().controller_metrics_url)["grokmesh_replicas_ready"] == 1
            wait_until(lambda: daemon.running(service.address) == successor.pid, 10)
            time.sleep(1.0)
            with (
                Client(service.address, api_key=spender, attempts=1) as client,
                pytest.raises(grpc.RpcError, match="this key has 1 tokens a minute"),
            ):
                client.complete(PROMPT, max_tokens=1)
        finally:
            stop.set()
            successor.terminate()
            code = successor.wait(timeout=60)
        assert code == 0, log.read_text()
