"""Whatever shell or folder the service is started in: it works, or one line says what to do."""

from __future__ import annotations

import asyncio
import io
import os
import pathlib
import shutil
import socket
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from typing import Any

import pytest
import yaml

from cluster import daemon, local_ray
from cluster.cli import main
from cluster.config.reader import load_config
from cluster.config.schema import ConfigError
from cluster.local_ray import LocalClusterError, local_cluster, prepare_environment
from cluster.service import check_free, end_left
from cluster.telemetry.web import WebServer
from grok.serving.v1 import cluster_pb2
from grokmesh import Client, ClientError, Tls
from tests.conftest import DEMO
from tests.support.ports import free_port
from tests.support.service import running
from workers.host.environment import EnvironmentProblem, bypass_proxies, settle
from workers.runtime.compilation import use_cache
from workers.telemetry import logs

ONE_HOST = {"hosts": 1, "devices_per_host": 1, "data": 1, "model": 1}


def test_a_mesh_forms_behind_a_proxy_in_a_long_folder_beside_modules_of_other_names(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = tmp_path / ("temporary" * 10)
    here = tmp_path / "here"
    for folder in (long, here):
        folder.mkdir()
    for module in ("cluster", "workers", "yaml", "numpy", "jax", "ray"):
        (here / f"{module}.py").write_text("raise RuntimeError('this is not the module that was meant')\n")
    for name in ("http_proxy", "https_proxy", "grpc_proxy", "HTTP_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.setenv("TMPDIR", str(long))
    monkeypatch.setenv("JAX_ENABLE_X64", "1")
    monkeypatch.setenv("JAX_DISABLE_JIT", "1")
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=8")
    monkeypatch.chdir(here)
    mesh = {"hosts": 2, "devices_per_host": 1, "data": 1, "model": 2}
    with running(tmp_path, mesh=mesh) as service, Client(service.address) as client:
        assert client.complete("In the beginning", max_tokens=4).finish_reason


def test_flags_that_xla_does_not_know_are_named_as_the_reason() -> None:
    with pytest.raises(EnvironmentProblem, match=r"XLA_FLAGS=--xla_no_such_flag: .*; unset what XLA does not know"):
        settle({**os.environ, "XLA_FLAGS": "--xla_no_such_flag"})


def test_what_decides_how_jax_computes_is_taken_out_of_the_environment() -> None:
    environment = {"JAX_ENABLE_X64": "1", "JAX_DEBUG_NANS": "1", "JAX_PLATFORMS": "cuda", "PATH": "/bin"}
    settle(environment)
    assert environment == {"JAX_PLATFORMS": "cuda", "PATH": "/bin"}


def test_the_hosts_of_a_mesh_are_reached_past_proxies_and_others_as_before() -> None:
    environment = {"http_proxy": "http://proxy:3128", "no_proxy": "example.com"}
    bypass_proxies(["10.0.0.1"], environment)
    assert environment["no_grpc_proxy"] == "example.com,10.0.0.1"
    assert environment["no_proxy"] == "example.com"


@pytest.fixture
def ray_environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What a test makes Ray read is undone."""
    for name in list(os.environ):
        monkeypatch.setenv(name, os.environ[name])
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    yield
    os.environ.pop("RAY_TMPDIR", None)


@pytest.mark.usefixtures("ray_environment")
@pytest.mark.parametrize("temporary", ["/tmp", "/" + "x" * 70])
def test_ray_gets_a_short_folder_that_nobody_else_sees(temporary: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.gettempdir", lambda: temporary)
    prepare_environment()
    folder = pathlib.Path(os.environ["RAY_TMPDIR"])
    assert len(str(folder)) < 36
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


@pytest.mark.usefixtures("ray_environment")
def test_ray_does_not_use_a_folder_that_somebody_else_has_laid_out(monkeypatch: pytest.MonkeyPatch) -> None:
    with tempfile.TemporaryDirectory(prefix="g", dir="/tmp") as base:
        (pathlib.Path(base) / f"grokmesh-{os.getuid()}").symlink_to("/")
        monkeypatch.setattr("tempfile.gettempdir", lambda: base)
        with pytest.raises(LocalClusterError, match=r"another user's; set RAY_TMPDIR to a short folder of yours"):
            prepare_environment()


@pytest.mark.usefixtures("ray_environment")
def test_a_local_cluster_writes_nothing_to_the_services_log(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    with tempfile.TemporaryDirectory(prefix="g", dir="/tmp") as folder:
        monkeypatch.setenv("RAY_TMPDIR", folder)
        prepare_environment()
        before = pathlib.Path(folder) / "ray" / "ray_current_cluster"
        before.parent.mkdir()
        before.write_text("127.0.0.1:1")
        with local_cluster(1, 1) as address:
            assert before.read_text() == address
    assert capfd.readouterr().err == ""


def test_a_local_cluster_that_is_slow_to_start_is_started_once_more(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As Ray gives a node 30 s, however busy the machine is."""
    clusters: list[list[str]] = []

    class Cluster:
        address = "127.0.0.1:1"

        def __init__(self) -> None:
            clusters.append([])

        def add_node(self, **_: Any) -> None:
            if len(clusters) == 1:
                raise Exception("The current node timed out during startup.")
            clusters[-1].append("node")

        def shutdown(self) -> None:
            clusters[-1].append("shutdown")

    monkeypatch.setattr("ray.cluster_utils.Cluster", Cluster)
    monkeypatch.setattr("sys.argv", ["local_ray", "2", "1"])
    monkeypatch.setattr("sys.stdin", io.StringIO())
    local_ray._main()
    assert clusters == [["shutdown"], ["node", "node", "shutdown"]]
    assert capsys.readouterr().out == "local Ray cluster at 127.0.0.1:1\n"


@pytest.mark.parametrize("host", ["127.0.0.1", "no.such.host.invalid"])
def test_a_service_whose_ray_cluster_is_gone_is_not_waited_for(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cluster.service.STOP_SECONDS", 0.0)
    address = f"{host}:{free_port('127.0.0.1')}"
    with pytest.raises(OSError, match=f"cluster.address={address}: no Ray cluster answers"):
        end_left(daemon.Entry("key", address, "grokmesh"), forget=False)


@pytest.mark.parametrize("optimize", ["1", "2"])
def test_without_assertions_nothing_is_started(optimize: str) -> None:
    command = [sys.executable, "-m", "cluster.cli", "serve"]
    environment = {**os.environ, "PYTHONOPTIMIZE": optimize}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "unset PYTHONOPTIMIZE" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_user_without_a_home_is_told_what_to_set(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def no_home() -> pathlib.Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_STATE_HOME", raising=False)
    monkeypatch.setattr(pathlib.Path, "home", no_home)
    assert main(["stop"]) == 2
    assert "set XDG_STATE_HOME" in capsys.readouterr().err
    use_cache("~nobody-here/xla", 0)  # nothing is kept, and nothing else is lost


@pytest.mark.skipif(os.getuid() != 0, reason="only root can be somebody else")
def test_a_user_that_no_file_knows_serves_without_a_home_beside_another_users_ray(tmp_path: pathlib.Path) -> None:
    stranger = 54321  # who may read where this project lies, which a test's user may not need to
    own = tmp_path / "own"
    own.mkdir()
    os.chown(own, stranger, stranger)
    address = f"127.0.0.1:{free_port('127.0.0.1')}"
    config = own / "ray_config.yaml"
    sections = {"model": {"name": "demo", "checkpoint": str(DEMO)}, "mesh": ONE_HOST}
    sections |= {"gateway": {"address": address}, "telemetry": {"address": "127.0.0.1:0"}}
    config.write_text(yaml.safe_dump(sections))
    become = f"setpriv --reuid {stranger} --regid {stranger} --clear-groups"
    become += " --inh-caps +dac_read_search --ambient-caps +dac_read_search"
    environment = {"PATH": os.environ["PATH"], "XDG_STATE_HOME": str(own)}

    def grokmesh(*words: str) -> str:
        command = [*become.split(), sys.executable, "-P", "-m", "cluster.cli", *words]
        done = subprocess.run(command, env=environment, cwd="/", capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    try:
        grokmesh("serve", "--config", str(config), "--detach")
        assert grokmesh("generate", "In the beginning", "--max-tokens", "4", "--address", address)
    finally:
        grokmesh("stop", "--address", address)
        shutil.rmtree(f"/tmp/grokmesh-{stranger}")


def test_a_path_of_a_user_who_is_unknown_is_refused_with_its_line(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "ray_config.yaml"
    path.write_text(f"model: {{name: x, checkpoint: {DEMO}}}\ngateway:\n  api_keys: ~no-such-user/keys.yaml\n")
    with pytest.raises(ConfigError, match=r"ray_config\.yaml:3: gateway\.api_keys=.*; write the whole path"):
        load_config(path)


def test_a_configuration_may_begin_with_a_byte_order_mark(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "ray_config.yaml"
    path.write_text(f"\N{BYTE ORDER MARK}model: {{name: x, checkpoint: {DEMO}}}\n", encoding="utf-8")
    assert load_config(path).model.name == "x"


def test_an_address_that_somebody_listens_at_is_refused_however_it_is_spelled() -> None:
    with socket.create_server(("127.0.0.1", 0), reuse_port=True) as taken:
        port = taken.getsockname()[1]
        for address in (f"127.0.0.1:{port}", f"localhost:{port}", f"0.0.0.0:{port}"):
            with pytest.raises(OSError, match="can't be listened on"):
                check_free("gateway.address", address)
    check_free("gateway.address", f"127.0.0.1:{free_port('127.0.0.1')}")


def test_metrics_listen_at_an_ipv6_address_in_brackets() -> None:
    async def listen() -> int:
        server = WebServer("[::1]:0", cluster_pb2.GetStatusResponse, lambda: 0)
        try:
            return await server.start()
        finally:
            await server.stop()

    assert asyncio.run(listen()) > 0


@pytest.mark.parametrize("key", ["gm-äöü", "gm-a\x00b", "gm a"])
def test_a_key_that_can_not_be_sent_is_refused_and_a_line_end_is_none(key: str) -> None:
    with pytest.raises(ClientError, match="the API key has characters that no key has"):
        Client(api_key=key)
    Client(api_key="gm-abc\r\n").close()


def test_half_a_client_certificate_is_refused(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ClientError, match="belong together"):
        Tls(certificate=tmp_path / "x.pem").credentials()
    assert main(["status", "--tls-certificate", "x.pem"]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_a_note_of_a_service_is_its_users_alone_and_gives_its_key(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    address = f"127.0.0.1:{free_port('127.0.0.1')}"
    assert daemon.admin_key(address) is None
    with daemon.noted(address, daemon.Entry("gm-local-x")):
        (note,) = (tmp_path / "grokmesh").glob("*.json")
        assert stat.S_IMODE(note.stat().st_mode) == 0o600
        port = address.rpartition(":")[2]
        assert daemon.admin_key(address) == daemon.admin_key(f"localhost:{port}") == "gm-local-x"
        assert daemon.admin_key(f"192.0.2.1:{port}") is None, "another machine's service is not ours"
    assert daemon.admin_key(address) is None


def test_a_log_does_not_grow_for_ever(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "serve.log"
    with path.open("ab", buffering=0) as log:
        log.write(b"a" * 100)
        logs.keep_small(log.fileno(), 100)
        assert path.stat().st_size == 100
        log.write(b"b")
        logs.keep_small(log.fileno(), 100)
        log.write(b"c")
    assert path.read_bytes() == b"c"
    assert (tmp_path / "serve.log.1").read_bytes() == b"a" * 100 + b"b"


def test_text_that_a_terminal_does_not_know_is_shown_all_the_same(tmp_path: pathlib.Path) -> None:
    command = [sys.executable, "-m", "cluster.cli", "inspect", str(tmp_path / "\N{GRINNING FACE}")]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0", "LC_ALL": "C"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr


def test_a_worker_that_has_no_place_for_its_cache_serves_without_one(tmp_path: pathlib.Path) -> None:
    with running(tmp_path, mesh=ONE_HOST, cluster={"compilation_cache": "/proc/nowhere"}) as service:
        service.wait_for(lambda status: status.replicas[0].state == cluster_pb2.REPLICA_STATE_READY, 60)
