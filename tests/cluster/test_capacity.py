"""`grokmesh plan`, and what `grokmesh serve` asks the planner."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import sys

import pytest
import yaml

from cluster.capacity import smaller_configs, with_pages
from cluster.cli import main
from cluster.config.reader import load_config
from cluster.config.schema import Config, ConfigError
from tests.conftest import DEMO
from tools.aot.report import Engine, compile_in_subprocess
from workers.capacity.hardware import tpu_slice
from workers.capacity.memory import Precision
from workers.model.config import GrokConfig

V6E = {"tpu_pod_type": "v6e-16"}
V6E_MESH = {"platform": "tpu", "hosts": 4, "devices_per_host": 4, "data": 2, "model": 8, "rules": "batch"}
ENGINE = {"slots": 512, "page_size": 64, "prefill_chunk": 512}
MODEL = {"name": "m", "checkpoint": str(DEMO), "activations": "bfloat16"}
PATH = pathlib.Path("ray_config.yaml")


def _config(folder: pathlib.Path, **sections: object) -> Config:
    path = folder / "ray_config.yaml"
    path.write_text(yaml.safe_dump({"model": MODEL, **sections}))
    return load_config(path)


def test_pages_are_what_memory_has_room_for(tmp_path: pathlib.Path) -> None:
    config = _config(tmp_path, cluster=V6E, mesh=V6E_MESH, engine=ENGINE)
    chosen = with_pages(config, GrokConfig(), PATH).engine.kv_pages
    assert chosen is not None
    assert 3_000 < chosen < 512 * 128
    few = dataclasses.replace(config, engine=dataclasses.replace(config.engine, slots=8))
    assert with_pages(few, GrokConfig(), PATH).engine.kv_pages == 8 * 128 + 2  # all that the slots can fill
    more = dataclasses.replace(few, engine=dataclasses.replace(few.engine, kv_pages=2000))  # to remember prompts by
    assert with_pages(more, GrokConfig(), PATH) is more


def test_what_cannot_fit_is_refused_before_anything_is_started(tmp_path: pathlib.Path) -> None:
    gpus = {"accelerator": "H100"}
    small = _config(tmp_path, cluster=gpus, mesh={"platform": "gpu", "devices_per_host": 4, "model": 4})
    with pytest.raises(ConfigError, match=r"does not fit 1 x 4xH100: .* weights take 7\d\.\d\d, .*grokmesh plan"):
        with_pages(small, GrokConfig(), PATH)
    greedy = _config(tmp_path, cluster=V6E, mesh=V6E_MESH, engine={**ENGINE, "kv_pages": 100_000})
    with pytest.raises(ConfigError, match="50000 KV pages a group, of which"):
        with_pages(greedy, GrokConfig(), PATH)


def test_a_cpu_host_is_as_large_as_it_is_said_to_be_or_as_this_machine(tmp_path: pathlib.Path) -> None:
    with pytest.raises(ConfigError, match="does not fit"):
        with_pages(_config(tmp_path), GrokConfig(), PATH)  # no machine that runs tests has 350 GB
    server = _config(tmp_path, cluster={"address": "head:6379", "memory_per_host": 768.0})
    assert with_pages(server, GrokConfig(), PATH).engine.kv_pages
    unknown = _config(tmp_path, cluster={"address": "head:6379"})
    assert with_pages(unknown, GrokConfig(), PATH) is unknown


def test_meshes_of_fewer_hosts_are_those_on_which_the_model_fits(tmp_path: pathlib.Path) -> None:
    mesh = {"hosts": 8, "devices_per_host": 1, "data": 1, "model": 8, "smallest": 1}
    servers = {"address": "head:6379", "memory_per_host": 192.0}
    config = _config(tmp_path, cluster=servers, mesh=mesh, engine={"slots": 8})
    found = smaller_configs(config, GrokConfig(), PATH)
    # 3, 5, 6 and 7 do not divide its heads as its rules want, and one host is too small.
    assert [(one.mesh.hosts, one.mesh.data, one.mesh.model) for one in found] == [(4, 1, 4), (2, 1, 2)]
    assert all(one.engine.kv_pages for one in found)
    assert all(one.cluster == config.cluster for one in found)
    larger = dataclasses.replace(config, mesh=dataclasses.replace(config.mesh, smallest=3))
    assert [one.mesh.hosts for one in smaller_configs(larger, GrokConfig(), PATH)] == [4]
    with pytest.raises(ConfigError, match=r"mesh.smallest=1 needs cluster.memory_per_host"):
        smaller_configs(_config(tmp_path, cluster={"address": "head:6379"}, mesh=mesh), GrokConfig(), PATH)
    assert smaller_configs(_config(tmp_path), GrokConfig(), PATH) == ()


def test_plan_tells_what_fits(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--gpus", "8xH100", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["fits"]
    assert told["mesh"] == {"data": 1, "model": 8, "rules": "tensor"}
    assert told["sequences_of_whole_context"] >= 8
    assert main(["plan", "--topology", "v5e:4x4"]) == 1
    assert "v5e:4x8" in capsys.readouterr().out
    assert main(["plan", "--model", "demo", "--cpu", "8,20,100", "--hosts", "2"]) == 0
    assert "How fast?" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--gpus", "H100"], "such as 8xH100"),
        (["--topology", "v6e:3x3"], "no such slice"),
        (["--cpu", "1,2"], "three numbers"),
        (["--gpus", "8xH100", "--context", "9000"], "1 to 8192"),
        (["--gpus", "8xH100", "--hosts", "0"], "at least 1"),
        (["--gpus", "8xH100", "--concurrency", "0"], "at least 1"),
        (["--gpus", "8xH100", "--price", "-1"], "more than 0"),
        (["--gpus", "8xH100", "--model", "/nowhere"], "/nowhere/ckpt-0: is no directory"),
        (["--cpu", "512,300,4000", "--compile"], "CPU hosts compile when they start"),
    ],
)
def test_what_makes_no_sense_is_said_in_a_line(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line


@pytest.mark.parametrize(
    "hardware", [["--topology", "v6e:4x4"], ["--gpus", "8xH100"], ["--cpu", "768,400,6000", "--hosts", "2"]]
)
def test_a_configuration_that_the_planner_writes_is_one(
    hardware: list[str], tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["plan", *hardware, "--json"])
    told = json.loads(capsys.readouterr().out)["configuration"]
    config = _config(tmp_path, **told | {"model": {"name": "m", "checkpoint": "x", **told["model"]}})
    assert with_pages(config, GrokConfig(), PATH) == config


def test_without_a_compiler_it_is_said_what_brings_one(capsys: pytest.CaptureFixture[str]) -> None:
    code = main(["plan", "--model", "demo", "--topology", "v6e:1x1", "--compile"])
    said = capsys.readouterr()
    if code == 2:
        assert "`make aot`" in said.err
    else:  # this environment has one
        assert "What does the compiler say of decode?" in said.out


def test_a_compiler_that_dies_says_that_it_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    engine = Engine(8, 9, 64, 64, 64)
    found = compile_in_subprocess(GrokConfig(), tpu_slice("v6e:1x1"), (1, 1, "tensor"), Precision(), "decode", engine)
    assert not found.fits
    assert "ended with code 1" in found.problem
