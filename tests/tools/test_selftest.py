"""`grokmesh selftest` on CPU hosts, and its comparisons of kernels."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import subprocess
import sys
from typing import Any

import jax
import pytest

from cluster.commands.selftest_hosts import _groups, platform_of
from tests.conftest import DEMO
from tests.support.ray_cluster import ray_cluster
from tools.selftest import kernels as selftest_kernels
from tools.selftest import sections
from tools.selftest.findings import Finding, Outcome
from tools.selftest.layers import layers_that_fit
from workers.kernels.cpu.kernels import native_kernels
from workers.kernels.gpu.kernels import gpu_kernels
from workers.kernels.interface import Kernels
from workers.kernels.tpu.kernels import tpu_kernels
from workers.kernels.tpu.matmul import Target
from workers.kernels.xla import portable
from workers.model.config import GrokConfig

pytestmark = pytest.mark.slow


def _selftest(path: pathlib.Path, *words: str) -> tuple[int, str, dict[str, list[Finding]]]:
    """Exit code, output, and the findings of each host."""
    command = [sys.executable, "-m", "cluster.cli", "selftest", "--config", str(DEMO / "config.json"), *words]
    command += ["--platform", "cpu", "--json", str(path / "found.json")]
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=600, check=False
    )
    hosts = json.loads((path / "found.json").read_text())["hosts"]
    parsed = {
        host: [Finding(**{**f, "outcome": Outcome(f["outcome"])}) for f in findings] for host, findings in hosts.items()
    }
    return done.returncode, done.stdout, parsed


def test_hosts_of_a_cluster_are_tested_from_memory_to_checkpoint_and_together(tmp_path: pathlib.Path) -> None:
    with ray_cluster(2) as address:
        code, shown, found = _selftest(
            tmp_path,
            "--ray",
            address,
            "--devices",
            "2",
            "--checkpoint",
            str(DEMO),
            "--only",
            "host",
            "layers",
            "loading",
        )
    assert code == 0, shown
    together = found.pop("2 hosts together")
    assert [finding.name.rpartition("over ")[2] for finding in together] == ["4 devices"] * 2
    assert len(found) == 2
    for findings in found.values():
        assert all(finding.name in shown for finding in findings)
        by_name = {finding.name: finding for finding in findings}
        assert by_name["memory, read"].figures["bandwidth"] > 1e8
        assert by_name["sum of 64 KiB over 2 devices"].outcome == Outcome.OK
        assert by_name["prompt of 512"].figures["seconds"] > 0
        assert by_name["bits, alone and in company"].outcome == Outcome.OK
        assert by_name["bits, alone and in company"].figures["guesses"] > 0
        assert by_name[str(DEMO)].figures["bytes"] > 0


def test_golden_sets_are_computed_on_all_devices() -> None:
    options = sections.Options("cpu", devices=2, golden=str(sections.GOLDEN), only=("golden",))
    found = [(finding.name, finding.outcome) for finding in sections.run_sections(options)]
    assert found == [("head128-s5", "ok"), ("nano-s1", "ok"), ("text-s1", "ok")]
    (none,) = sections.run_sections(dataclasses.replace(options, golden="/nothing/here"))
    assert none.outcome == Outcome.SKIPPED


def test_a_section_that_fails_is_a_finding() -> None:
    (finding,) = sections.run_sections(sections.Options("cpu", config="/nothing/here", only=("layers",)))
    assert (finding.section, finding.outcome) == ("layers", Outcome.FAILED)
    assert "/nothing/here" in finding.text


@pytest.mark.parametrize(
    "kernels",
    [native_kernels(), gpu_kernels(interpret=True), tpu_kernels(Target(interpret=True))],
    ids=["cpu", "gpu", "tpu"],
)
def test_right_kernels_are_close_to_plain_jax(kernels: Kernels, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selftest_kernels, "ROWS", (3,))
    assert [one.name for one in selftest_kernels.compare(kernels) if one.error > one.tolerance] == []


def test_wrong_kernels_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selftest_kernels, "ROWS", (3,))

    def norm(*arguments: Any, **more: Any) -> jax.Array:
        return portable.norm(*arguments, **more).at[0, 0].set(float("nan"))

    def route(*arguments: Any) -> tuple[jax.Array, ...]:
        gates, experts, probabilities = portable.route(*arguments)
        return gates * 1.01, experts, probabilities

    wrong: Any = dataclasses.replace(native_kernels(), norm=norm)
    wrong = dataclasses.replace(wrong, route=route)
    found = [one.name for one in selftest_kernels.compare(wrong) if not one.error <= one.tolerance]
    assert found == ["norm, 3 rows", "router, 3 rows"]


def test_hosts_with_an_interconnect_are_tested_together_in_rank_order() -> None:
    def host(name: str, slice_name: str, worker: int) -> dict[str, Any]:
        labels = {"ray.io/tpu-slice-name": slice_name, "ray.io/tpu-worker-id": str(worker)}
        return {"NodeID": name, "Resources": {"TPU": 4}, "Labels": labels}

    hosts = [host("b1", "b", 1), host("a0", "a", 0), host("b0", "b", 0)]
    assert [[node["NodeID"] for node in group] for group in _groups(hosts)] == [["b0", "b1"]]
    assert platform_of([{"Resources": {"CPU": 8}}, *hosts]) == "tpu"
    assert platform_of([{"Resources": {"CPU": 8}}]) == "cpu"


def test_as_many_layers_as_memory_holds() -> None:
    config = GrokConfig()
    assert layers_that_fit(config, 65e9) == (12, 1)
    assert layers_that_fit(config, 3e9) == (2, 4)
    assert layers_that_fit(config, 1e12) == (64, 1)
    with pytest.raises(ValueError, match="do not hold"):
        layers_that_fit(config, 1e8)
