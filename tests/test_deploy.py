"""What is in deploy/: manifests, cluster files and image, as far as they can be judged without a cloud."""

from __future__ import annotations

import copy
import itertools
import os
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

from cluster.config.reader import load_config
from tests.support.schemas import SCHEMAS
from workers.kernels.cpu.kernels import INSTRUCTION_SETS

PROJECT = pathlib.Path(__file__).parent.parent
DEPLOY = PROJECT / "deploy"
CLUSTERS = ("cluster.yaml", "gcp-gpu.yaml", "gcp-tpu.yaml")
KUBERNETES = "1.35"
LOCKS = sorted(PROJECT.glob("requirements*.lock"))
PLUGINS = {"cpu": set(), "gpu": {"jax-cuda13-plugin", "jax-cuda13-pjrt"}, "tpu": {"libtpu"}}
# Stands for Python: makes an environment that has itself for Python, and writes down what that is told.
STUB = """#!/bin/sh
case "$2" in
    venv) mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;;
    *) echo "$@" >> "$TOLD" ;;
esac
"""


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
    for probe, place in (("startupProbe", "/live"), ("livenessProbe", "/live"), ("readinessProbe", "/ready")):
        assert container[probe]["httpGet"] == {"path": place, "port": "http"}
    mounts = [mount["mountPath"] for mount in container["volumeMounts"]]
    gateway = config.gateway
    for file in (config.model.checkpoint, gateway.api_keys, gateway.tls_certificate, gateway.tls_key):
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


def _locked(path: pathlib.Path) -> dict[str, list[str]]:
    """What a lock says of each package: versions, where each is meant, and their hashes. Fails at any other line."""
    packages: dict[str, list[str]] = {}
    name = ""
    for line in path.read_text().splitlines():
        if found := re.fullmatch(r"([a-z0-9-]+)(?:\[[a-z0-9,-]+\])?==[a-z0-9.!+]+( ; [^;]+)? \\", line):
            name = found[1]
        else:
            assert re.fullmatch(r"    --hash=sha256:[0-9a-f]{64}( \\)?", line), f"{path.name}: {line}"
        packages.setdefault(name, []).append(line.removesuffix(" \\").strip())
    return packages


@pytest.mark.parametrize("lock", LOCKS, ids=[lock.name for lock in LOCKS])
def test_a_lock_names_versions_and_hashes_of_all_its_packages_and_no_place_to_get_them_from(lock: pathlib.Path) -> None:
    for name, lines in _locked(lock).items():
        for line, following in itertools.pairwise([*lines, name]):
            assert "==" not in line or following.startswith("--hash="), f"{name} has a version without a hash"


def test_a_package_is_the_same_in_all_locks() -> None:
    # On which platforms it is wanted may differ.
    everything = {
        lock: {name: [line.partition(" ; ")[0] for line in lines] for name, lines in _locked(lock).items()}
        for lock in LOCKS
    }
    for one, other in itertools.combinations(LOCKS, 2):
        first, second = everything[one], everything[other]
        differing = {name for name in first.keys() & second.keys() if first[name] != second[name]}
        assert not differing, f"{one.name} and {other.name}"


@pytest.mark.parametrize("extra", PLUGINS)
def test_a_host_installs_nothing_without_its_hash(extra: str, tmp_path: pathlib.Path) -> None:
    """One lock holds all that a platform needs, JAX's plugin too; the project itself comes from here, without dependencies."""
    python, told = tmp_path / "python", tmp_path / "told"
    python.write_text(STUB)
    python.chmod(0o755)
    environment = {**os.environ, "PYTHON": str(python), "EXTRA": extra, "TOLD": str(told)}
    subprocess.run([DEPLOY / "install.sh", tmp_path / "grokmesh"], env=environment, check=True)
    packages, project = told.read_text().splitlines()
    found = re.fullmatch(r"-m pip install( --[a-z-]+)* --require-hashes -r (\S+)", packages)
    assert found, packages
    assert re.fullmatch(r"-m pip install( --[a-z-]+)* --no-deps --no-build-isolation \.", project)
    locked, base = _locked(PROJECT / found[2]), _locked(PROJECT / "requirements.lock")
    assert base.keys() | PLUGINS[extra] <= locked.keys()


def test_a_platform_that_is_unknown_is_refused_before_anything_is_made(tmp_path: pathlib.Path) -> None:
    install = [DEPLOY / "install.sh", tmp_path / "grokmesh"]
    environment = {**os.environ, "EXTRA": "npu"}
    done = subprocess.run(install, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (2, "EXTRA=npu is unknown; use cpu, gpu or tpu\n")
    assert not list(tmp_path.iterdir())


def test_whatever_else_is_installed_by_tools_and_deploy_is_hashed_too() -> None:
    lines = [
        (path.name, line)
        for folder in (PROJECT / "tools", DEPLOY)
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.suffix != ".pyc" and path.name != "install.sh"
        for line in path.read_text().splitlines()
        if re.search(r"\bpip[0-9.]* install|\buv (pip|add|sync)|\bpipx ", line)
    ]
    assert {name for name, _ in lines} >= {"gcp-gpu.yaml", "gcp-tpu.yaml"}
    for name, line in lines:
        found = re.search(r"install --require-hashes -r ~/grokmesh/(\S+)$", line)
        assert found, f"{name}: {line}"
        assert PROJECT / found[1] in LOCKS


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
