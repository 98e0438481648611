"""Replicas and gateways are restarted, one after the other, under load: no request fails. `make restarts` does it fifty
times."""

from __future__ import annotations

import contextlib
import os
import pathlib

from cluster import daemon
from grokmesh import Client
from tests.chaos.history import Load, make_cases
from tests.support.ports import free_port
from tests.support.service import Service, running

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


def test_of_two_gateways_one_is_always_there(tmp_path: pathlib.Path) -> None:
    """Each with a replica of its own; clients know the addresses of both."""

    def start(name: str, stack: contextlib.ExitStack) -> Service:
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        gateway = {"address": f"127.0.0.1:{ports[name]}", "drain_seconds": 3}
        xla = {"compilation_cache": str(tmp_path / "xla")}
        return stack.enter_context(running(folder, mesh=ONE_HOST, gateway=gateway, cluster=xla))

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
