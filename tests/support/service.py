"""A real service for tests: `grokmesh serve` as a process, on a local Ray cluster."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import pathlib
import signal
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import yaml

from cluster import daemon
from grok.serving.v1 import cluster_pb2
from grokmesh import Client
from tests.conftest import DEMO
from tests.support.ports import free_port

START_SECONDS = 180.0
#: Of all tests: what one service has compiled, the next does not.
COMPILED = str(pathlib.Path(__file__).parents[2] / "build" / "compiled-by-tests")


@dataclasses.dataclass(frozen=True)
class Service:
    """A running service."""

    address: str
    process: subprocess.Popen[bytes]
    api_key: str | None = None

    def status(self) -> cluster_pb2.GetStatusResponse:
        """Its status."""
        with Client(self.address, api_key=self.api_key) as client:
            return client.status(timeout=5)

    def kill(self, host: cluster_pb2.HostStatus, number: int) -> None:
        """Sends a signal to a host's worker."""
        os.kill(host.pid, number)

    def heal(self) -> None:
        """Nothing to do: no host of a local cluster is ever lost."""

    def wait_for(self, reached: Callable[[cluster_pb2.GetStatusResponse], bool], seconds: float) -> None:
        """Returns once the status is as wanted; fails after `seconds`."""
        deadline, status = time.monotonic() + seconds, None
        while True:
            with contextlib.suppress(grpc.RpcError):  # a gateway may just be starting
                if reached(status := self.status()):
                    return
            assert time.monotonic() < deadline, f"not reached within {seconds} s: {status}"
            time.sleep(0.05)


def has_ended(before: cluster_pb2.ReplicaStatus, now: cluster_pb2.ReplicaStatus) -> bool:
    """Whether the epoch of a replica that served is over."""
    return now.epoch > before.epoch or now.state != cluster_pb2.REPLICA_STATE_READY


@contextlib.contextmanager
def running(folder: pathlib.Path, api_key: str | None = None, **sections: Any) -> Iterator[Service]:
    """Serves the demo model, configured by `sections`, while the block runs; it must end cleanly, unless the block has killed
    it."""
    address, metrics = (f"127.0.0.1:{free_port('127.0.0.1')}" for _ in range(2))
    gateway = {"address": address, **sections.get("gateway", {})}
    config = {
        "model": {"name": "demo", "checkpoint": str(DEMO)},
        "telemetry": {"address": metrics},
        **sections,
        "cluster": {"compilation_cache": COMPILED, **sections.get("cluster", {})},
        "gateway": gateway,
    }
    path, log = folder / "ray_config.yaml", folder / "serve.log"
    path.write_text(yaml.safe_dump(config))
    process = daemon.launch(path, log, detached=False)
    try:
        daemon.follow(process, log, START_SECONDS)
        yield Service(gateway["address"], process, api_key)
    finally:
        process.terminate()
        code = process.wait(timeout=60)
    assert code in (0, -signal.SIGKILL), log.read_text()


def read_metrics(url: str) -> dict[str, float]:
    """The samples of a Prometheus endpoint by name and labels."""
    with urllib.request.urlopen(url, timeout=5) as response:
        lines = response.read().decode().splitlines()
    return {line.rsplit(" ", 1)[0]: float(line.rsplit(" ", 1)[1]) for line in lines if not line.startswith("#")}
