"""After its first start a service reads no weights again: not for its next epoch, and not when it starts anew."""

from __future__ import annotations

import os
import pathlib
import signal

import pytest

from cluster import daemon
from grok.serving.v1 import cluster_pb2
from grokmesh import Client
from tests.conftest import DEMO
from tests.support.service import Service, read_metrics, running
from workers.checkpoint.checkpoint import open_checkpoint

pytestmark = pytest.mark.slow
MESH = {"hosts": 2, "devices_per_host": 1, "data": 1, "model": 2}


def _read(service: Service) -> int:
    """Bytes of the checkpoint that the workers of now have read."""
    (replica,) = service.status().replicas
    assert replica.state == cluster_pb2.REPLICA_STATE_READY
    return sum(host.bytes_read for host in replica.hosts)


def _text(service: Service) -> str:
    with Client(service.address) as client:
        return client.complete("And it came to pass", max_tokens=12, seed=3).text


def test_weights_are_read_once(tmp_path: pathlib.Path) -> None:
    cache = tmp_path / "cache"
    model = {"name": "demo", "checkpoint": str(DEMO), "weights_cache": str(cache)}
    with running(tmp_path, model=model, mesh=MESH) as service:
        assert _read(service) >= open_checkpoint(DEMO).nbytes
        text = _text(service)
        (replica,) = service.status().replicas
        os.kill(replica.hosts[1].pid, signal.SIGKILL)
        service.wait_for(lambda status: status.replicas[0].epoch > replica.epoch, seconds=30)
        assert _text(service) == text
        assert _read(service) == 0
    with running(tmp_path, model=model, mesh=MESH) as service:
        assert _text(service) == text
        assert _read(service) == 0
        (replica,) = service.status().replicas
        mapped = [read_metrics(host.metrics_url)["grokmesh_worker_cached_weight_bytes"] for host in replica.hosts]
        assert sum(mapped) > 0.9 * open_checkpoint(DEMO).nbytes
        assert cache.exists()
        daemon.ask(service.address, daemon.FORGET_WEIGHTS)
    assert not cache.exists()
