"""A service on two hosts with keys, traces and a load, watched by a real Prometheus with the rules of deploy/prometheus."""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import json
import pathlib
import random
import subprocess
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from typing import Any

import grpc
import yaml
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from opentelemetry.proto.trace.v1 import trace_pb2

from cluster.gateway.auth.api_keys import new_key
from grokmesh import Client
from tests.support.ports import free_port
from tests.support.service import Service, running

PROMETHEUS = pathlib.Path(__file__).parent.parent.parent / "deploy" / "prometheus"
PROMPTS = ("And it came to pass", "In the beginning", "HAMLET.\nTo be, or not to be: that is the question " * 3)
RATE_INTERVAL = "10s"


def filled(expression: str) -> str:
    """A panel's expression with its variables as Grafana would fill them in."""
    return expression.replace("$__rate_interval", RATE_INTERVAL).replace("$model", ".*")


class TraceReceiver(trace_service_pb2_grpc.TraceServiceServicer):
    """An OTLP receiver that keeps every span."""

    def __init__(self) -> None:
        self.spans: list[trace_pb2.Span] = []

    def Export(self, request: Any, context: Any) -> Any:  # noqa: N802
        for resource in request.resource_spans:
            for scope in resource.scope_spans:
                self.spans += scope.spans
        return trace_service_pb2.ExportTraceServiceResponse()


@dataclasses.dataclass(frozen=True)
class Stage:
    """Everything that is up."""

    service: Service
    log: pathlib.Path
    keys: dict[str, str]
    traces: TraceReceiver
    prometheus: str

    def query(self, expression: str) -> list[dict[str, Any]]:
        """The result of a PromQL expression now. Fails if Prometheus refuses it."""
        answer = self._get("query", query=expression)
        result: list[dict[str, Any]] = answer["result"]
        return result

    def query_range(self, expression: str, seconds: float, step: float) -> list[dict[str, Any]]:
        """The result over the last `seconds`."""
        now = time.time()
        answer = self._get("query_range", query=expression, start=now - seconds, end=now, step=step)
        result: list[dict[str, Any]] = answer["result"]
        return result

    def get(self, path: str) -> Any:
        """Something else of Prometheus' API."""
        return self._get(path)

    def _get(self, path: str, **parameters: Any) -> Any:
        url = f"{self.prometheus}/api/v1/{path}?{urllib.parse.urlencode(parameters)}"
        with urllib.request.urlopen(url, timeout=10) as response:
            answer = json.load(response)
        assert answer["status"] == "success", answer
        return answer["data"]


@contextlib.contextmanager
def monitored(folder: pathlib.Path) -> Iterator[Stage]:
    """The stage, with a load that goes on while the block runs."""
    receiver = TraceReceiver()
    collector = grpc.server(concurrent.futures.ThreadPoolExecutor(2))
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(receiver, collector)
    port = collector.add_insecure_port("127.0.0.1:0")
    collector.start()
    keys = {}
    lines = []
    # Eve's requests are turned away, but for the first.
    for name, limits in (("alice", ", scopes: [generate, admin]"), ("bob", ""), ("eve", ", tokens_per_minute: 1")):
        keys[name], line = new_key(name)
        lines.append(f"{name}: {{sha256: '{line.split()[1]}'{limits}}}")
    (folder / "keys.yaml").write_text("\n".join(lines))
    address, metrics = (f"127.0.0.1:{free_port('127.0.0.1')}" for _ in range(2))
    with contextlib.ExitStack() as stack:
        stack.callback(collector.stop, None)
        service = stack.enter_context(
            running(
                folder,
                api_key=keys["alice"],
                mesh={"hosts": 2, "devices_per_host": 2, "data": 2, "model": 2},
                gateway={"address": address, "api_keys": "keys.yaml"},
                telemetry={"address": metrics, "traces_endpoint": f"http://127.0.0.1:{port}"},
            )
        )
        prometheus = stack.enter_context(_prometheus(folder, metrics))
        stack.enter_context(_load(address, keys))
        yield Stage(service, folder / "serve.log", keys, receiver, prometheus)


@contextlib.contextmanager
def _prometheus(folder: pathlib.Path, targets: str) -> Iterator[str]:
    """Prometheus with the project's configuration, but for intervals and the address of the gateway."""
    config = yaml.safe_load((PROMETHEUS / "prometheus.yml").read_text())
    config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    config["rule_files"] = [str(PROMETHEUS / "rules" / "*.yml")]
    (job,) = [job for job in config["scrape_configs"] if job["job_name"] == "grokmesh"]
    job["http_sd_configs"] = [{"url": f"http://{targets}/targets", "refresh_interval": "1s"}]
    config["scrape_configs"] = [job]
    path = folder / "prometheus.yml"
    path.write_text(yaml.safe_dump(config))
    address = f"127.0.0.1:{free_port('127.0.0.1')}"
    command = ["prometheus", f"--config.file={path}", f"--storage.tsdb.path={folder / 'tsdb'}"]
    command.append(f"--web.listen-address={address}")
    with (folder / "prometheus.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + 20
        while True:
            with contextlib.suppress(OSError), urllib.request.urlopen(f"http://{address}/-/ready", timeout=1):
                break
            assert time.monotonic() < deadline, (folder / "prometheus.log").read_text()
            time.sleep(0.1)
        yield f"http://{address}"
    finally:
        process.terminate()
        process.wait(timeout=20)


@contextlib.contextmanager
def _load(address: str, keys: dict[str, str]) -> Iterator[None]:
    """Requests of all keys, and now and then one that is wrong, until the block ends."""
    stop = threading.Event()

    def work(name: str, seed: int) -> None:
        rng = random.Random(seed)
        with Client(address, api_key=keys[name]) as client, Client(address, attempts=1) as stranger:
            while not stop.is_set():
                with contextlib.suppress(grpc.RpcError):
                    client.complete(rng.choice(PROMPTS), max_tokens=rng.randint(2, 40), temperature=1.0)
                    list(client.generate(rng.choice(PROMPTS), max_tokens=rng.randint(2, 30)))
                with contextlib.suppress(grpc.RpcError):
                    client.complete("", max_tokens=1)
                time.sleep(0.1)
                with contextlib.suppress(grpc.RpcError):
                    stranger.complete("who am I?", max_tokens=1)

    threads = [threading.Thread(target=work, args=(name, i), daemon=True) for i, name in enumerate((*keys, *keys))]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        stop.set()
        for thread in threads:
            thread.join(timeout=60)
