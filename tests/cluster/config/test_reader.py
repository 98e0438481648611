"""ray_config.yaml: what is wrong is said with the line, and what to do."""

from __future__ import annotations

import pathlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.config.reader import load_config
from cluster.config.schema import ConfigError, check_model
from workers.model.config import GrokConfig

PROJECT = pathlib.Path(__file__).parents[3]
MINIMAL = "model:\n  name: m\n  checkpoint: ckpt\n"


def _load(tmp_path: pathlib.Path, text: str) -> object:
    path = tmp_path / "ray_config.yaml"
    path.write_text(text)
    return load_config(path)


def test_the_projects_own_configuration_is_that_of_the_demo() -> None:
    config = load_config(PROJECT / "ray_config.yaml")
    assert (config.mesh.hosts, config.mesh.data, config.mesh.model, config.replicas) == (2, 2, 2, 1)
    assert config.model.checkpoint == str(PROJECT / "models" / "demo")
    assert config.gateway.address.startswith("127.0.0.1:")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("mesh: {}\n", ": model is missing"),
        ("model:\n  name: m\n", ":1: model.checkpoint is missing"),
        (MINIMAL + "mash: {}\n", ":4: unknown setting mash; known are model, cluster, "),
        (MINIMAL + "mesh:\n  hots: 2\n", ":5: unknown setting mesh.hots; known are platform, hosts, "),
        (MINIMAL + "replicas: two\n", ":4: replicas: expected int, got 'two'"),
        (MINIMAL + "replicas: true\n", ":4: replicas: expected int, got True"),
        (MINIMAL + "replicas: 0\n", ":4: replicas=0 must be at least 1"),
        (MINIMAL + "replicas: 1\nreplicas: 2\n", ":5: replicas is set twice"),
        (MINIMAL + "mesh:\n  hosts: 2\n  data: 3\n", r":6: mesh.data=3 x mesh.model=1 must be 2"),
        (MINIMAL + "mesh:\n  rules: magic\n", ":5: mesh.rules=magic is unknown; use tensor, batch, xai"),
        (MINIMAL + "gateway:\n  address: nowhere\n", ":5: gateway.address=nowhere is no host:port"),
        (MINIMAL + "gateway:\n  drain_seconds: .nan\n", ":5: gateway.drain_seconds=nan"),
        (MINIMAL + "autoscaling:\n  up_seconds: -1\n", ":5: autoscaling.up_seconds=-1.0 must be"),
        (
            MINIMAL + "replicas: 3\nautoscaling:\n  max_replicas: 2\n",
            ":6: autoscaling.max_replicas=2 is less than replicas=3",
        ),
        (
            MINIMAL + "mesh:\n  platform: tpu\n  hosts: 2\n  data: 2\n",
            ":5: mesh.platform=tpu with mesh.hosts=2 needs cluster.tpu_pod_type",
        ),
        (MINIMAL + "telemetry:\n  plan_log: plans\n", ":5: telemetry.plan_log=plans must be an absolute path"),
        (MINIMAL + "engine: [1]\n", ":4: engine must be a mapping"),
        (
            MINIMAL + "engine:\n  slots: 3\nmesh:\n  hosts: 2\n  data: 2\n  rules: batch\n",
            ":5: engine.slots=3 must be a mult",
        ),
        (MINIMAL + "x: [\n", ":5: not YAML: "),
        (MINIMAL + "replicas: !!python/object/apply:os.system [id]\n", ":4: replicas: expected int"),
    ],
)
def test_mistakes_are_explained(tmp_path: pathlib.Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=rf"ray_config\.yaml{message}".replace("[", r"\[")):
        _load(tmp_path, text)


def test_a_mesh_that_splits_heads_is_refused(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "ray_config.yaml"
    path.write_text(MINIMAL + "mesh:\n  devices_per_host: 6\n  model: 6\n  rules: batch\n")
    with pytest.raises(ConfigError, match=r"mesh\.model=6 does not divide 8 KV heads; use 1, 2, 4, 8"):
        check_model(load_config(path), GrokConfig(), path)


def test_pages_that_hold_no_whole_sequence_are_refused(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "ray_config.yaml"
    path.write_text(MINIMAL + "engine:\n  context: 160\n  kv_pages: 10\n")
    with pytest.raises(ConfigError, match=r"kv_pages=10 can't hold one sequence .* use at least 11"):
        check_model(load_config(path), GrokConfig(), path)


@settings(max_examples=300, deadline=None)
@given(st.text(max_size=80))
def test_no_text_gives_anything_but_a_configuration_or_an_error(text: str) -> None:
    path = pathlib.Path("/tmp/grokmesh-config-test.yaml")
    path.write_text(MINIMAL + text, errors="surrogatepass")
    try:
        load_config(path)
    except ConfigError:
        pass
    finally:
        path.unlink()
