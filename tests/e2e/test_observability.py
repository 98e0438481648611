"""Metrics, dashboards, rules, traces, logs, profiles and the status page, against the real things."""

from __future__ import annotations

import gzip
import json
import math
import pathlib
import re
import subprocess
import urllib.request
from collections.abc import Iterator
from typing import Any

import grpc
import pytest
import yaml

from cluster.cli import main
from cluster.commands.access import API_KEY_VARIABLE
from cluster.telemetry.metrics import COMPLETING
from grok.serving.v1 import generation_pb2, generation_pb2_grpc
from grokmesh import Client, completion_request
from tests.support.chromium import chromium
from tests.support.debian import require
from tests.support.monitored import PROMETHEUS, Stage, filled, monitored
from tests.support.waiting import wait_until
from tools.dashboards.build import DASHBOARDS, FOLDER
from tools.dashboards.build import main as build_dashboards

PROMPT = "The vine that nobody ever asked about before"
RUNBOOK = pathlib.Path(__file__).parent.parent.parent / "docs" / "runbook.md"


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    require(prometheus="prometheus", promtool="prometheus")
    with monitored(tmp_path_factory.mktemp("monitored")) as stage:
        # Gateway, controller and two workers.
        wait_until(lambda: len(stage.query('up{job="grokmesh"} == 1')) == 4, 30)
        yield stage


def _panels() -> Iterator[tuple[str, dict[str, Any]]]:
    for path in sorted(FOLDER.glob("*.json")):
        for panel in json.loads(path.read_text())["panels"]:
            if panel["type"] != "row":
                yield path.stem, panel


def _expressions() -> Iterator[tuple[str, str]]:
    for dashboard, panel in _panels():
        for target in panel["targets"]:
            yield f"{dashboard}: {panel['title']}", filled(target["expr"])


def _own_metrics(text: str) -> set[str]:
    """The metrics of ours, by family, that an expression or a rule names."""
    names = re.findall(r"\b(?:gen_ai|grokmesh|process)_[a-z0-9_]+", text)
    return {re.sub(r"_(bucket|sum|count)$", "", name) for name in names if not name.startswith("gen_ai_request_model")}


def test_the_committed_dashboards_are_those_that_the_code_builds(tmp_path: pathlib.Path) -> None:
    build_dashboards(tmp_path)
    built = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert built == {path.name: path.read_text() for path in FOLDER.iterdir()}
    assert len(built) == len(DASHBOARDS) == 5


def test_every_panel_says_what_to_do_and_has_a_unit() -> None:
    for dashboard, panel in _panels():
        assert len(panel["description"]) > 60, (dashboard, panel["title"])
        assert panel["fieldConfig"]["defaults"]["unit"]
    for path in FOLDER.iterdir():
        dashboard = json.loads(path.read_text())
        assert dashboard["uid"] == path.stem
        assert [variable["name"] for variable in dashboard["templating"]["list"]] == ["datasource", "model"]


def test_rules_hold_what_they_promise() -> None:
    require(promtool="prometheus")
    rules = sorted(map(str, (PROMETHEUS / "rules").iterdir()))
    for command in (
        ["check", "config", str(PROMETHEUS / "prometheus.yml")],
        ["check", "rules", *rules],
        ["test", "rules", *sorted(map(str, (PROMETHEUS / "tests").iterdir()))],
    ):
        done = subprocess.run(["promtool", *command], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr


def test_the_objectives_count_every_method_that_completes() -> None:
    rules = (PROMETHEUS / "rules" / "objectives.yml").read_text()
    assert set(re.findall(r'method=~"([^"]+)"', rules)) == {"|".join(COMPLETING)}


def test_every_alert_has_its_section_in_the_runbook_and_its_test() -> None:
    sections = set(re.findall(r"^## (\w+)$", RUNBOOK.read_text(), re.MULTILINE))
    tests = yaml.safe_load((PROMETHEUS / "tests" / "alerts.yml").read_text())["tests"]
    tested = {a["alertname"] for test in tests for a in test["alert_rule_test"] if a["exp_alerts"]}
    groups = yaml.safe_load((PROMETHEUS / "rules" / "alerts.yml").read_text())["groups"]
    alerts = [rule for group in groups for rule in group["rules"]]
    assert {rule["alert"] for rule in alerts} == sections == tested
    for rule in alerts:
        assert rule["annotations"]["runbook_url"] == f"docs/runbook.md#{rule['alert'].lower()}"
        assert rule["labels"]["severity"] in ("page", "ticket")


def test_prometheus_finds_all_processes_by_itself(stage: Stage) -> None:
    def found() -> set[tuple[str, str | None, str]]:
        up = [series["metric"] for series in stage.query("up")]
        return {(metric["component"], metric.get("rank"), metric["model"]) for metric in up}

    processes = {("gateway", None), ("controller", None), ("worker", "0"), ("worker", "1")}
    wait_until(lambda: found() == {(component, rank, "demo") for component, rank in processes}, 20, found)


def test_every_panel_has_data(stage: Stage) -> None:
    empty = []
    for name, expression in _expressions():
        # Rates need samples, and a quantile has no value while nothing happens.
        def has_data(expression: str = expression) -> bool:
            return any(math.isfinite(float(series["value"][1])) for series in stage.query(expression))

        try:
            wait_until(has_data, 20)
        except AssertionError:
            empty.append((name, expression))
    assert empty == []


def test_every_metric_is_on_a_panel_and_every_panel_has_its_metric(stage: Stage) -> None:
    exported: set[str] = set()
    for target in stage.get("targets")["activeTargets"]:
        with urllib.request.urlopen(target["scrapeUrl"], timeout=5) as response:
            text = response.read().decode()
        exported |= set(re.findall(r"^# TYPE (\S+)", text, re.MULTILINE))
    shown = {metric for _, expression in _expressions() for metric in _own_metrics(expression)}
    recorded = _own_metrics((PROMETHEUS / "rules" / "objectives.yml").read_text())
    assert exported - shown - recorded == set()
    assert shown - exported == set()
    rules = "".join((PROMETHEUS / "rules" / name).read_text() for name in ("alerts.yml", "vllm.yml"))
    assert _own_metrics(rules) - exported == set()


def test_all_rules_evaluate_and_the_names_of_vllm_have_values(stage: Stage) -> None:
    for group in stage.get("rules")["groups"]:
        assert [rule["lastError"] for rule in group["rules"] if rule["health"] != "ok"] == []
    (group,) = yaml.safe_load((PROMETHEUS / "rules" / "vllm.yml").read_text())["groups"]
    for rule in group["rules"]:
        series = stage.query(rule["record"])
        assert series, rule["record"]
        assert all(s["metric"]["model_name"] == "demo" for s in series), rule["record"]
    assert {s["metric"]["finished_reason"] for s in stage.query("vllm:request_success_total")} <= {"stop", "length"}


def test_no_token_is_dropped_by_an_expert(stage: Stage) -> None:
    """Since the start, by the devices' own count: all assignments but those of steps under way."""
    computed, asked = "sum(grokmesh_moe_expert_tokens_total)", "sum(grokmesh_moe_assignments_total)"
    (ratio,) = stage.query(f"{computed} / {asked}")
    assert 0.9 < float(ratio["value"][1]) <= 1.0
    by_layer = stage.query("sum by (layers) (grokmesh_moe_expert_tokens_total)")
    assert len(by_layer) == 6
    assert len({series["value"][1] for series in by_layer}) == 1, "every layer sees every token"


def test_usage_is_counted_by_key_and_strangers_are_refused(stage: Stage) -> None:
    used = stage.query('grokmesh_gateway_tokens_total{kind="completion"} > 0')
    assert {series["metric"]["key"] for series in used} == {"alice", "bob", "eve"}
    for api_key in (None, "gm-wrong", ""):
        with Client(stage.service.address, api_key=api_key) as client, pytest.raises(grpc.RpcError) as raised:
            client.complete(PROMPT, max_tokens=1)
        error: Any = raised.value
        assert error.code() is grpc.StatusCode.UNAUTHENTICATED


def test_a_key_goes_before_no_others_unless_it_may(stage: Stage) -> None:
    with Client(stage.service.address, api_key=stage.keys["bob"]) as client, pytest.raises(grpc.RpcError) as raised:
        client.complete(PROMPT, max_tokens=1, priority=1)
    error: Any = raised.value
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "this key may ask for at most 0" in error.details()


def test_a_trace_goes_through_queue_prefill_and_decode(stage: Stage) -> None:
    trace_id, parent_id = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
    metadata = (
        ("traceparent", f"00-{trace_id}-{parent_id}-01"), ("authorization", f"Bearer {stage.keys['bob']}"),
    )  # fmt: skip
    request = generation_pb2.GenerateRequest(completion=completion_request(PROMPT, max_tokens=8, ignore_eos=True))
    with grpc.insecure_channel(stage.service.address) as channel:
        stub = generation_pb2_grpc.GenerationServiceStub(channel)
        request_id = list(stub.Generate(request, metadata=metadata))[-1].request_id

    def spans() -> dict[str, Any]:
        return {span.name: span for span in stage.traces.spans if span.trace_id.hex() == trace_id}

    wait_until(lambda: len(spans()) == 4, 15)
    found = spans()
    call = found.pop("grok.serving.v1.GenerationService/Generate")
    assert call.parent_span_id.hex() == parent_id
    attributes = {a.key: a.value.string_value or a.value.int_value for a in call.attributes}
    assert attributes["grokmesh.request_id"] == request_id
    assert (attributes["grokmesh.key"], attributes["grokmesh.completion_tokens"]) == ("bob", 8)
    queue, prefill, decode = (found[name] for name in ("queue", "prefill", "decode"))
    assert all(span.parent_span_id == call.span_id for span in found.values())
    assert queue.start_time_unix_nano <= queue.end_time_unix_nano <= prefill.end_time_unix_nano
    assert prefill.end_time_unix_nano <= decode.end_time_unix_nano <= call.end_time_unix_nano
    assert PROMPT not in str(call)


def test_each_request_has_one_line_of_log_without_its_secrets(stage: Stage) -> None:
    with Client(stage.service.address, api_key=stage.keys["alice"]) as client:
        completion = client.complete(PROMPT, max_tokens=6, ignore_eos=True)
    wait_until(lambda: completion.request_id in stage.log.read_text(), 5)
    text = stage.log.read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    assert all({"time", "level", "message", "request_id", "epoch"} <= line.keys() for line in lines)
    (line,) = [line for line in lines if line["request_id"] == completion.request_id]
    assert (line["level"], line["method"], line["code"], line["key"]) == ("info", "GenerateOnce", "OK", "alice")
    assert (line["replica"], line["epoch"], line["completion_tokens"]) == (0, 1, 6)
    assert PROMPT not in text
    assert not any(key in text for key in stage.keys.values())


def test_probes_are_told_whether_it_lives_and_whether_it_is_ready(stage: Stage) -> None:
    base = stage.service.status().metrics_url.removesuffix("metrics")
    for path, said in (("live", b"alive\n"), ("ready", b"ready\n")):
        with urllib.request.urlopen(base + path, timeout=5) as response:
            assert response.read() == said


def test_a_profile_holds_the_steps_of_all_hosts(
    stage: Stage, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(API_KEY_VARIABLE, stage.keys["alice"])
    arguments = ["--address", stage.service.address, "--output", str(tmp_path)]
    assert main(["profile", "--steps", "5", *arguments]) == 0
    (run,) = (tmp_path / "plugins" / "profile").iterdir()
    for rank in (0, 1):
        assert (run / f"host-{rank}.xplane.pb").stat().st_size > 10_000
        trace = json.loads(gzip.decompress((run / f"host-{rank}.trace.json.gz").read_bytes()))
        assert any("jit__decode" in json.dumps(event) for event in trace["traceEvents"])
    assert main(["profile", "--replica", "7", *arguments]) == 1
    assert "INVALID_ARGUMENT: replica: is 7" in capsys.readouterr().err


def test_the_status_page_shows_hosts_mesh_and_experts(stage: Stage, tmp_path: pathlib.Path) -> None:
    require(chromium="chromium")
    url = stage.service.status().metrics_url.removesuffix("metrics")
    page = chromium(tmp_path, "--virtual-time-budget=4000", "--dump-dom", url)
    for shown in (">serving<", "1 of 1 replicas ready", "epoch 1, mesh 2 x 2", "0 (leader)", "expert 7", ">ready<"):
        assert shown in page, page
    assert not re.search(r"""(src|href)=["']?(https?:)?//""", page), "nothing comes from elsewhere"
