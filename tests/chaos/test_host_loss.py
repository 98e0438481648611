"""A host is lost, and another takes its place: where the new one's weights come from, and how long all of it takes.

`make losses` turns hosts off many times, with the model GROKMESH_MODEL, and prints the times.
"""

from __future__ import annotations

import contextlib
import functools
import os
import pathlib
import statistics
import time

import pytest

from grok.serving.v1 import cluster_pb2
from grokmesh import Client
from tests.chaos import namespaces
from tests.conftest import DEMO
from tests.support.object_store import URL, object_store
from tests.support.service import read_metrics
from tests.support.waiting import wait_until

LOSSES = int(os.environ.get("GROKMESH_LOSSES", "0"))
MODEL = os.environ.get("GROKMESH_MODEL", str(DEMO))
#: Each host's own memory.
CACHE = "/dev/shm/grokmesh"
READY = cluster_pb2.REPLICA_STATE_READY
_Replica = cluster_pb2.ReplicaStatus

pytestmark = pytest.mark.skipif(not namespaces.possible(), reason="needs root to make namespaces")


def _rebuilt(cluster: namespaces.Cluster, before: _Replica) -> _Replica:
    """The replica, once it serves again."""

    def ready() -> bool:
        now = cluster.status().replicas[0]
        return now.epoch > before.epoch and now.state == READY

    wait_until(ready, 120, cluster.status)
    return cluster.status().replicas[0]


def test_a_spare_host_takes_its_weights_from_one_that_holds_the_same(tmp_path: pathlib.Path) -> None:
    model = {"name": "demo", "checkpoint": URL, "weights_cache": CACHE}
    mesh = {"hosts": 1, "devices_per_host": 1, "data": 1, "model": 1}
    with contextlib.ExitStack() as stack:
        # Its server is far slower than hosts are among each other.
        environment = stack.enter_context(object_store(DEMO, "0.0.0.0"))
        port = environment["AWS_ENDPOINT_URL"].rpartition(":")[2]
        environment["AWS_ENDPOINT_URL"] = f"http://{namespaces.NETWORK}.1:{port}"
        cluster = stack.enter_context(namespaces.cluster(tmp_path, environment, model=model, mesh=mesh, replicas=2))
        wait_until(lambda: all(replica.state == READY for replica in cluster.status().replicas), 60, cluster.status)
        before = cluster.status().replicas[0]
        cluster.hosts.crash(cluster.name_of(before.hosts[0].address))
        (host,) = _rebuilt(cluster, before).hosts
        assert host.address != before.hosts[0].address
        assert host.bytes_read == 0
        assert read_metrics(host.metrics_url)["grokmesh_worker_taken_weight_bytes"] > 0


@pytest.mark.skipif("GROKMESH_FAULTS" not in os.environ, reason="`make chaos` does it; the simulation plays it")
def test_a_replica_goes_on_with_fewer_hosts_and_grows_again(tmp_path: pathlib.Path) -> None:
    mesh = {"hosts": 2, "devices_per_host": 1, "data": 1, "model": 2, "smallest": 1}
    with namespaces.cluster(tmp_path, mesh=mesh, cluster={"memory_per_host": 2}) as cluster:
        (before,) = cluster.status().replicas
        used = [cluster.name_of(host.address) for host in before.hosts]
        spare = next(name for name in namespaces.WORKERS if name not in used)

        def serves_with(hosts: int) -> bool:
            (now,) = cluster.status().replicas
            return now.state == READY and len(now.hosts) == now.mesh_model == hosts

        with Client(cluster.address) as client:
            stream = functools.partial(client.generate, "And it came to pass", max_tokens=480, seed=3, ignore_eos=True)
            alone = [token.id for part in stream() for token in part.tokens]
            parts = stream()
            first = next(parts)
            cluster.hosts.crash(spare)
            cluster.hosts.crash(used[1])
            tokens = [token.id for part in (first, *parts) for token in part.tokens]
            assert serves_with(1)
            # What had come stays; sums over fewer devices are rounded otherwise, so what comes then may differ.
            assert len(tokens) == len(alone)
            assert tokens[: len(first.tokens)] == alone[: len(first.tokens)]
            for name in (spare, used[1]):
                cluster.hosts.restart(name)
                cluster.join(name)
            wait_until(lambda: serves_with(2), 90, cluster.status)
            assert [token.id for part in stream() for token in part.tokens] == alone


@pytest.mark.skipif(not LOSSES, reason="`make losses` measures")
def test_how_long_a_lost_host_is_missed(tmp_path: pathlib.Path) -> None:
    model = {"name": "demo", "checkpoint": MODEL, "weights_cache": CACHE}
    mesh = {"hosts": 2, "devices_per_host": 1, "data": 1, "model": 2}
    noticed, rebuilt, ready = [], [], []
    with namespaces.cluster(tmp_path, model=model, mesh=mesh) as cluster, Client(cluster.address) as client:
        for loss in range(LOSSES):
            before = cluster.status().replicas[0]
            victim = cluster.name_of(before.hosts[1 - loss % 2].address)
            began = time.monotonic()
            cluster.hosts.crash(victim)
            wait_until(lambda: cluster.status().replicas[0].state != READY, 30, pause=0.02)
            noticed.append(time.monotonic() - began)
            now = _rebuilt(cluster, before)
            ready.append(time.monotonic() - began)
            rebuilt.append(ready[-1] - noticed[-1])
            assert client.complete("And it came to pass", max_tokens=4).finish_reason
            stayed = [host for host in now.hosts if host.address in {host.address for host in before.hosts}]
            new = [host for host in now.hosts if host not in stayed]
            print(
                f"{loss + 1}: noticed after {noticed[-1]:.2f} s, ready {rebuilt[-1]:.2f} s later, in epoch {now.epoch}; "
                f"bytes read: {[host.bytes_read for host in stayed]} stayed, {[host.bytes_read for host in new]} new"
            )
            assert [host.bytes_read for host in stayed] == [0]
            cluster.hosts.restart(victim)
            cluster.join(victim)
            time.sleep(5)
    for name, times in (("noticed", noticed), ("then ready", rebuilt), ("both", ready)):
        print(f"{name}: p50 {statistics.median(times):.2f} s, most {max(times):.2f} s")
