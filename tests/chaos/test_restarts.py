"""Replicas and gateways are restarted, one after the other, under load: no request fails. `make restarts` does it fifty
times."""

from __future__ import annotations

import contextlib
import os
import pathlib

import yaml

from cluster import daemon
from grok.serving.v1 import cluster_pb2
from grokmesh import Client
from tests.chaos.history import Load, make_cases
from tests.support.ports import free_port
from tests.support.ray_cluster import ray_cluster
from tests.support.service import START_SECONDS, Service, running

RESTARTS = int(os.environ.get("GROKMESH_RESTARTS", "2"))
ONE_HOST = {"hosts": 1, "devices_per_host": 1, "data": 1, "model": 1}


def _admin(service: Service) -> Client:
    return Client(service.address, api_key=daemon.admin_key(service.address))


def test_replicas_are_restarted_while_clients_that_never_try_twice_stream(tmp_path: pathlib.Path) -> None:
    with running(tmp_path, mesh=ONE_HOST, replicas=2) as service, _admin(service) as client:
        service.wait_for(lambda status: all(replica.slots for replica in status.replicas), 60)
        load = Load(service.address, make_cases(client, 12, seed=5), clients=4, seed=5, attempts=1)
        epochs = [client.restart(i % 2, timeout=60) for i in range(RESTARTS)]
        history = load.stop()
    assert epochs == [2 + i // 2 for i in range(RESTARTS)]
    history.check(RESTARTS)


def test_a_service_is_replaced_on_the_hosts_that_it_has(tmp_path: pathlib.Path) -> None:
    """Each successor goes on with the mesh as it is; the last one is configured otherwise, and gives it new workers."""
    with (
        ray_cluster(1) as address,
        running(tmp_path, mesh=ONE_HOST, cluster={"address": address}) as service,
        contextlib.ExitStack() as stack,
    ):
        with Client(service.address) as client:
            cases = make_cases(client, 12, seed=7)
        load = Load(service.address, cases, clients=4, seed=7)
        last, path, pids = service.process, tmp_path / "ray_config.yaml", _workers(service)
        for i in range(RESTARTS):
            if i == RESTARTS - 1:
                config = yaml.safe_load(path.read_text())
                path.write_text(yaml.safe_dump({**config, "engine": {"slots": 8}}))
            gateways = {gateway.pid for gateway in service.status().gateways}
            log = tmp_path / f"successor{i}.log"
            successor = daemon.launch(path, log, detached=False, replace=True)
            stack.callback(successor.wait, timeout=60)
            stack.callback(successor.terminate)
            daemon.follow(successor, log, START_SECONDS)
            assert last.wait(timeout=60) == 0
            service.wait_for(lambda status, old=gateways: _replaced(status, old), 60)  # type: ignore[misc]
            assert i == RESTARTS - 1 or _workers(service) == pids
            last = successor
        service.wait_for(lambda status: status.replicas[0].epoch == 2 and status.replicas[0].slots == 8, 60)
        history = load.stop()
    history.check(RESTARTS)


def _workers(service: Service) -> list[int]:
    return [host.pid for replica in service.status().replicas for host in replica.hosts]


def _replaced(status: cluster_pb2.GetStatusResponse, old: set[int]) -> bool:
    pids = {gateway.pid for gateway in status.gateways if gateway.listening}
    return bool(pids) and not pids & old


def test_of_two_gateways_one_is_always_there(tmp_path: pathlib.Path) -> None:
    """Each with a replica of its own; clients know the addresses of both."""

    def start(name: str, stack: contextlib.ExitStack) -> Service:
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        gateway = {"address": f"127.0.0.1:{ports[name]}", "drain_seconds": 3}
        return stack.enter_context(running(folder, mesh=ONE_HOST, gateway=gateway))

    ports = {name: free_port("127.0.0.1") for name in "ab"}
    with contextlib.ExitStack() as stacks:
        lives = {name: stacks.enter_context(contextlib.ExitStack()) for name in ports}
        for name, life in lives.items():
            service = start(name, life)
        with Client(service.address) as client:
            cases = make_cases(client, 12, seed=6)
        address = "ipv4:" + ",".join(f"127.0.0.1:{port}" for port in ports.values())
        load = Load(address, cases, clients=4, seed=6)
        for i in range(RESTARTS // 2):
            name = "ab"[i % 2]
            lives[name].close()  # SIGTERM; it must end cleanly
            start(name, lives[name])
        history = load.stop()
    history.check(RESTARTS)
