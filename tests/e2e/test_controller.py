"""The mesh outlives the processes around it: its controller, and the service that has started it."""

from __future__ import annotations

import os
import pathlib
import signal
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import grpc
import pytest

from grok.serving.v1 import cluster_pb2
from grokmesh import Client
from tests.support.ray_cluster import ray_cluster
from tests.support.service import Service, running

MESH = {"hosts": 2, "devices_per_host": 1, "data": 1, "model": 2}
LONG: dict[str, Any] = {"max_tokens": 300, "ignore_eos": True, "temperature": 1.0, "seed": 5}
PROMPT = "In the beginning"


@pytest.fixture(scope="module")
def ray_address() -> Iterator[str]:
    """A cluster of two hosts that no service has started."""
    with ray_cluster(2) as address:
        yield address


def _served(status: cluster_pb2.GetStatusResponse) -> bool:
    return [replica.state for replica in status.replicas] == [cluster_pb2.REPLICA_STATE_READY]


def _mesh(service: Service) -> tuple[int, list[int]]:
    """Epoch and processes of the only replica, once it serves."""
    service.wait_for(_served, 60)
    (replica,) = service.status().replicas
    return replica.epoch, [host.pid for host in replica.hosts]


def test_a_controller_that_dies_goes_on_with_the_mesh_and_no_stream_notices(
    tmp_path: pathlib.Path, ray_address: str
) -> None:
    cluster = {"address": ray_address}
    with running(tmp_path, mesh=MESH, cluster=cluster) as service, Client(service.address) as client:
        before, whole = _mesh(service), client.complete(PROMPT, **LONG)
        for _ in range(3):
            pid = service.status().controller_pid
            stream = client.generate(PROMPT, **LONG)
            parts = [next(stream)]
            os.kill(pid, signal.SIGKILL)
            parts += stream
            assert tuple(token for part in parts for token in part.tokens) == whole.tokens
            service.wait_for(lambda status, dead=pid: status.controller_pid not in (0, dead), 30)  # type: ignore[misc]
            assert _mesh(service) == before
        os.kill(before[1][1], signal.SIGKILL)
        service.wait_for(lambda status: status.replicas[0].epoch == before[0] + 1 and _served(status), 60)
        assert client.complete(PROMPT, **LONG).tokens == whole.tokens
        for pid in (service.status().controller_pid, *_mesh(service)[1]):
            os.kill(pid, signal.SIGKILL)
        service.wait_for(lambda status: _served(status) and status.replicas[0].epoch == before[0] + 2, 60)


def test_a_service_that_dies_is_started_again_on_the_mesh_that_it_had(tmp_path: pathlib.Path, ray_address: str) -> None:
    cluster = {"address": ray_address}
    with running(tmp_path, mesh=MESH, cluster=cluster) as first:
        before, address = _mesh(first), first.address
        first.process.kill()
        first.process.wait()
        with running(tmp_path, mesh=MESH, cluster=cluster, gateway={"address": address}) as second:
            assert _mesh(second) == before
            with Client(second.address) as client:
                assert client.complete(PROMPT, max_tokens=8).tokens


def test_gateways_die_and_no_mesh_and_no_client_notices(tmp_path: pathlib.Path, ray_address: str) -> None:
    cluster = {"address": ray_address}
    with running(tmp_path, mesh=MESH, cluster=cluster, gateway={"processes": 2}) as service:
        service.wait_for(lambda status: sum(gateway.listening for gateway in status.gateways) == 2, 30)
        before = _mesh(service)
        with Client(service.address, attempts=8) as client:  # all gateways that it knows are away at once
            whole = client.complete(PROMPT, **LONG)
            for _ in range(3):
                stream = client.generate(PROMPT, **LONG)
                parts = [next(stream)]
                gateways = {gateway.pid for gateway in service.status().gateways}
                for pid in gateways:
                    os.kill(pid, signal.SIGKILL)
                parts += stream
                assert tuple(token for part in parts for token in part.tokens) == whole.tokens
                service.wait_for(lambda status, dead=gateways: _listening(status, dead) == 2, 30)  # type: ignore[misc]
        assert _mesh(service) == before


def test_a_service_goes_on_without_the_process_that_started_it_until_it_is_stopped(
    tmp_path: pathlib.Path, ray_address: str
) -> None:
    cluster = {"address": ray_address}
    with running(tmp_path, mesh=MESH, cluster=cluster) as service:
        before = _mesh(service)
        service.process.kill()
        service.process.wait()
        with Client(service.address) as client:
            assert client.complete(PROMPT, max_tokens=8).tokens
        assert _mesh(service) == before
        command = [sys.executable, "-P", "-m", "cluster.cli", "stop", "--address", service.address]
        subprocess.run(command, check=True, timeout=120)  # Ray reads its environment once in a process
        with pytest.raises(grpc.RpcError):
            service.status()
        assert not any(pathlib.Path(f"/proc/{pid}").exists() for pid in before[1])


def _listening(status: cluster_pb2.GetStatusResponse, dead: set[int]) -> int:
    return sum(gateway.listening for gateway in status.gateways if gateway.pid not in dead)
