"""A busy machine is no dead one: load beside eight busy loops, with a worker stopped for a second here and there, costs no
mesh; and real deaths beside them are noticed all the same.

`make alarms SECONDS=3600` plays it for so long, and prints how soon deaths are noticed.
"""

from __future__ import annotations

import contextlib
import os
import pathlib
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from grok.serving.v1 import cluster_pb2
from grokmesh import Client
from tests.chaos.history import Load, make_cases
from tests.support.service import Service, has_ended, running

SECONDS = int(os.environ.get("GROKMESH_ALARM_SECONDS", "0"))
LOOPS, DEATHS = 8, 6
READY = cluster_pb2.REPLICA_STATE_READY

pytestmark = pytest.mark.skipif(not SECONDS, reason="`make alarms` does it")


@contextlib.contextmanager
def _busy_loops() -> Iterator[None]:
    loops = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(LOOPS)]
    try:
        yield
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()


def _replica(service: Service) -> cluster_pb2.ReplicaStatus:
    return service.status().replicas[0]


def _noticed(service: Service, number: int, rank: int) -> float:
    """Seconds from a signal that ends a worker, or stops it for ever, until the mesh is given up."""
    before, began = _replica(service), time.monotonic()
    os.kill(before.hosts[rank].pid, number)
    service.wait_for(lambda status: has_ended(before, status.replicas[0]), 60)
    seconds = time.monotonic() - began
    service.wait_for(lambda s: s.replicas[0].epoch > before.epoch and s.replicas[0].state == READY, 300)
    return seconds


def test_a_busy_machine_costs_no_mesh(tmp_path: pathlib.Path) -> None:
    rng = random.Random(3)
    mesh = {"hosts": 2, "devices_per_host": 1, "data": 1, "model": 2}
    with running(tmp_path, mesh=mesh) as service:
        with Client(service.address) as client:
            cases = make_cases(client, 24, seed=3)
        before = _replica(service)
        load = Load(service.address, cases, clients=4, seed=3)
        with _busy_loops():
            stops, until = 0, time.monotonic() + SECONDS
            while time.monotonic() < until:
                time.sleep(rng.uniform(2, 10))
                pid = rng.choice(before.hosts).pid
                os.kill(pid, signal.SIGSTOP)
                time.sleep(1)
                os.kill(pid, signal.SIGCONT)
                stops += 1
            after = _replica(service)
            print(
                f"{SECONDS} s beside {LOOPS} busy loops, a worker stopped for a second {stops} times: epoch {after.epoch}"
            )
            load.stop().check(stops)
            assert (after.epoch, [h.pid for h in after.hosts]) == (before.epoch, [h.pid for h in before.hosts])
            # A stream that twelve losses in a row meet is blamed for them, but gets no wrong token.
            load = Load(service.address, cases, clients=4, seed=4)
            for number in (signal.SIGKILL, signal.SIGSTOP):
                times = [_noticed(service, number, death % 2) for death in range(DEATHS)]
                print(f"{number.name}: noticed after {', '.join(f'{seconds:.2f}' for seconds in sorted(times))} s")
            assert load.stop().wrong == []
