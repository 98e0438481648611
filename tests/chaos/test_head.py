"""Ray's head is lost and comes back: those who stream notice nothing, and lost workers are replaced as before."""

from __future__ import annotations

import pathlib
import signal
import time

import pytest

from grok.serving.v1 import cluster_pb2
from grokmesh import Client
from tests.chaos import namespaces
from tests.chaos.history import Load, make_cases
from tests.support.waiting import wait_until


def test_the_loss_of_rays_head_is_no_loss_to_clients(tmp_path: pathlib.Path) -> None:
    if not namespaces.possible():
        pytest.skip("needs root to make namespaces")
    with namespaces.cluster(tmp_path) as cluster:
        with Client(cluster.address) as client:
            cases = make_cases(client, 8, seed=3)
        load = Load(cluster.address, cases, clients=3, seed=3)
        before = cluster.status().replicas[0]
        assert not cluster.lets_in("RAY_AUTH_MODE=disabled"), "without Ray's token nobody may run anything"
        assert cluster.lets_in(*namespaces.ENVIRONMENT)
        cluster.end_head()
        time.sleep(5)
        done = load.history.completed
        wait_until(lambda: load.history.completed > done + 5, 60)
        cluster.start_head()
        time.sleep(5)
        after = cluster.status().replicas[0]
        assert (after.epoch, after.state) == (before.epoch, cluster_pb2.REPLICA_STATE_READY)
        assert [host.pid for host in after.hosts] == [host.pid for host in before.hosts]
        cluster.kill(after.hosts[1], signal.SIGKILL)

        def replaced() -> bool:
            replica = cluster.status().replicas[0]
            return replica.epoch > after.epoch and replica.state == cluster_pb2.REPLICA_STATE_READY

        wait_until(replaced, 90, lambda: cluster.status().replicas[0])
        load.stop().check(done + 5)
