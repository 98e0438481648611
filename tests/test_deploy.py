"""What is in deploy/: manifests, cluster files and image, as far as they can be judged without a cloud."""

from __future__ import annotations

import copy
import pathlib
import re
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import jsonschema
import pytest
import yaml
from kubernetes_validate.utils import validate as validate_kubernetes
from ray.autoscaler._private.util import prepare_config, validate_config

from cluster.config import load_config
from tests.schemas import SCHEMAS
from workers.kernels.cpu.kernels import INSTRUCTION_SETS

PROJECT = pathlib.Path(__file__).parent.parent
DEPLOY = PROJECT / "deploy"
CLUSTERS = ("cluster.yaml", "gcp-gpu.yaml", "gcp-tpu.yaml")
KUBERNETES = "1.35"


def _manifests() -> Iterator[tuple[str, dict[str, Any]]]:
    for path in sorted((DEPLOY / "kuberay").iterdir()):
        for manifest in yaml.safe_load_all(path.read_text()):
            yield f"{path.name}:{manifest['kind']}", manifest


def _ray_clusters() -> Iterator[tuple[str, dict[str, Any]]]:
    return ((name, manifest) for name, manifest in _manifests() if manifest["kind"] == "RayCluster")


def _groups(cluster: dict[str, Any]) -> list[dict[str, Any]]:
    return [cluster["spec"]["headGroupSpec"], *cluster["spec"]["workerGroupSpecs"]]


@pytest.mark.parametrize("manifest", [manifest for _, manifest in _manifests()], ids=[name for name, _ in _manifests()])
def test_every_manifest_is_what_its_schema_asks_for(manifest: dict[str, Any]) -> None:
    schema = SCHEMAS.get(manifest["kind"])
    if schema is None:
        validate_kubernetes(manifest, KUBERNETES, strict=True)
        return
    jsonschema.validate(manifest, schema)
    if manifest["kind"] == "RayCluster":
        for group in _groups(manifest):
            pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod"}, "spec": group["template"]["spec"]}
            validate_kubernetes(pod, KUBERNETES, strict=True)


def test_a_manifest_with_a_mistake_is_refused() -> None:
    for _, good in _ray_clusters():
        for part, change in (
            (("workerGroupSpecs", 0), {"numOfHost": 4}),
            (("workerGroupSpecs", 0), {"maxReplicas": "two"}),
            (("autoscalerOptions",), {"version": "v3"}),
        ):
            bad = copy.deepcopy(good)
            spoiled = bad["spec"]
            for step in part:
                spoiled = spoiled[step]
            spoiled.update(change)
            with pytest.raises(jsonschema.ValidationError):
                jsonschema.validate(bad, SCHEMAS["RayCluster"])


@pytest.mark.parametrize("name", ["gpu.yaml", "tpu.yaml"])
def test_the_mesh_of_a_manifest_is_that_of_its_pods(name: str, tmp_path: pathlib.Path) -> None:
    config_map, cluster = yaml.safe_load_all((DEPLOY / "kuberay" / name).read_text())
    path = tmp_path / "ray_config.yaml"
    path.write_text(config_map["data"]["ray_config.yaml"])
    config = load_config(path)
    head, workers = _groups(cluster)
    limits = workers["template"]["spec"]["containers"][0]["resources"]["limits"]
    (devices,) = [int(count) for resource, count in limits.items() if "/" in resource]
    assert (config.mesh.hosts, config.mesh.devices_per_host) == (workers.get("numOfHosts", 1), devices)
    assert workers["maxReplicas"] == config.autoscaling.max_replicas
    container = head["template"]["spec"]["containers"][0]
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert config.gateway.address == f"0.0.0.0:{ports['grpc']}"
    assert config.telemetry.address == f"0.0.0.0:{ports['http']}"
    assert container["readinessProbe"]["grpc"]["port"] == ports["grpc"]
    mounts = [mount["mountPath"] for mount in container["volumeMounts"]]
    for file in (config.model.checkpoint, config.gateway.api_keys):
        assert any(str(file).startswith(mount) for mount in mounts)


@pytest.mark.parametrize("name", CLUSTERS)
def test_ray_takes_the_cluster_files(name: str) -> None:
    config = yaml.safe_load((DEPLOY / name).read_text())
    validate_config(prepare_config(copy.deepcopy(config)))
    assert config["cluster_name"]
    for key, value in (("no_such_setting", 1), ("head_node_type", "nowhere")):
        with pytest.raises((jsonschema.ValidationError, ValueError)):
            validate_config(prepare_config({**copy.deepcopy(config), key: value}))


def test_a_local_cluster_counts_its_hosts_alike_everywhere() -> None:
    config = yaml.safe_load((DEPLOY / "cluster.yaml").read_text())
    hosts = 1 + len(config["provider"]["worker_ips"])
    (node_type,) = config["available_node_types"].values()
    assert {config["max_workers"], node_type["min_workers"], node_type["max_workers"]} == {hosts}


def test_the_clusters_service_is_configured_for_its_hosts() -> None:
    config = load_config(DEPLOY / "ray_config.yaml")
    assert (config.cluster.address, config.gateway.address) == ("auto", "0.0.0.0:50051")
    assert config.model.checkpoint == str(PROJECT / "models" / "demo")


def test_the_image_is_linted_pinned_and_installs_as_a_bare_machine_does(tmp_path: pathlib.Path) -> None:
    """Every RUN of the image that installs is run here, into a new folder; the others only make its user."""
    dockerfile = DEPLOY / "docker" / "Dockerfile"
    lint = subprocess.run(
        [pathlib.Path(sys.executable).parent / "hadolint", dockerfile], capture_output=True, text=True, check=False
    )
    assert lint.returncode == 0, lint.stdout
    text = dockerfile.read_text()
    assert all(re.search(r":\d+\.\d+\.\d+-", image) for image in re.findall(r"^FROM (\S+)", text, re.MULTILINE))
    install, user = re.findall(r"^RUN (.*)$", text, re.MULTILINE)
    assert re.fullmatch(r"groupadd [^;|]* && useradd [^;|]*", user)
    target = tmp_path / "grokmesh"
    command = install.replace("/opt/grokmesh", str(target)).replace("$EXTRA", "cpu")
    environment = {"PATH": f"{pathlib.Path(sys.base_prefix) / 'bin'}:/usr/bin:/bin", "HOME": str(tmp_path)}
    done = subprocess.run(
        command, shell=True, cwd=PROJECT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    inspect = [str(target / "bin" / "grokmesh"), "inspect", str(PROJECT / "models" / "demo")]
    shown = subprocess.run(inspect, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True).stdout
    assert "language_model/in_out_embed/embeddings" in shown
    kernels = "from workers.kernels.cpu.kernels import native_kernels; print(native_kernels().name)"
    python = [str(target / "bin" / "python"), "-c", kernels]
    built = subprocess.run(python, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    assert built.stdout.strip() in INSTRUCTION_SETS
    page = "import importlib.resources as r; print(r.files('cluster.telemetry').joinpath('status.html').is_file())"
    found = subprocess.run(
        [target / "bin" / "python", "-c", page], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert found.stdout.strip() == "True"
