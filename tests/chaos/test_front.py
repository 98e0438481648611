"""Gateways and the controller are killed under load: no worker is started again, no epoch ends, and no client sees more than a
pause. `make front` does it fifty times each."""

from __future__ import annotations

import itertools
import math
import os
import pathlib
import random
import signal
from collections.abc import Callable

from grok.serving.v1 import cluster_pb2
from grokmesh import Client
from tests.chaos.history import Load, make_cases
from tests.support.ray_cluster import ray_cluster
from tests.support.service import Service, running
from tests.support.waiting import wait_until

KILLS = int(os.environ.get("GROKMESH_KILLS", "1"))
GATEWAYS, CLIENTS = 2, 4
_Status = cluster_pb2.GetStatusResponse


def _mesh(status: _Status) -> list[tuple[int, list[int]]]:
    return [(replica.epoch, [host.pid for host in replica.hosts]) for replica in status.replicas]


def _gateways(status: _Status) -> set[int]:
    return {gateway.pid for gateway in status.gateways if gateway.listening}


def _controller(status: _Status) -> set[int]:
    return {status.controller_pid} - {0}


def _strike(service: Service, load: Load, victims: Callable[[_Status], set[int]], count: int) -> float:
    """Kills `count` of the processes that `victims` finds; the longest pause of a stream until there are as many again, and
    clients have got on."""
    before = victims(service.status())
    dead = set(random.sample(sorted(before), min(count, len(before))))
    load.history.longest_pause = 0.0
    for pid in dead:
        os.kill(pid, signal.SIGKILL)
    service.wait_for(lambda status: len(victims(status) - dead) == len(before), 60)
    streams = load.history.completed + 2 * CLIENTS
    wait_until(lambda: load.history.completed >= streams, 60)
    return load.history.longest_pause


def test_no_mesh_and_no_client_notices_that_gateways_and_the_controller_die(tmp_path: pathlib.Path) -> None:
    mesh = {"hosts": 2, "devices_per_host": 1, "data": 1, "model": 2}
    kinds = {"a gateway": (_gateways, 1), "all gateways": (_gateways, GATEWAYS), "the controller": (_controller, 1)}
    pauses: dict[str, list[float]] = {kind: [] for kind in kinds}
    gateway = {"processes": GATEWAYS}
    with (
        ray_cluster(2) as address,
        running(tmp_path, mesh=mesh, cluster={"address": address}, gateway=gateway) as service,
    ):
        service.wait_for(lambda status: len(_gateways(status)) == GATEWAYS, 60)
        before = _mesh(service.status())
        with Client(service.address) as client:
            cases = make_cases(client, 12, seed=9)
        load = Load(service.address, cases, clients=CLIENTS, seed=9)
        for kind, _ in itertools.product(kinds, range(KILLS)):
            pauses[kind].append(_strike(service, load, *kinds[kind]))
        history = load.stop()
        after = _mesh(service.status())
    for kind, found in pauses.items():
        found.sort()
        p50, p99 = (found[math.ceil(q * len(found)) - 1] for q in (0.5, 0.99))
        print(f"{kind} killed {len(found)} times: longest pause of a stream p50 {p50:.2f} s, p99 {p99:.2f} s")
        print("  ", *(f"{seconds:.2f}" for seconds in found))
    history.check(3 * KILLS)
    assert after == before
