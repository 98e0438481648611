"""A service on hosts of this machine that can be turned off and cut from the network, with one host to spare. Ray's head and
the gateway have hosts of their own."""

from __future__ import annotations

import contextlib
import os
import pathlib
import secrets
import subprocess
import time
from collections.abc import Iterator, Mapping
from typing import Any

import grpc
import yaml

from grok.serving.v1 import cluster_pb2
from grokmesh import Client
from tests.conftest import DEMO
from tests.rayup.hosts import Hosts
from tests.support.debian import require
from tests.support.service import COMPILED
from tests.support.waiting import wait_until

NETWORK = f"10.203.{os.getpid() % 250}"
HEAD, FRONT, WORKERS = "head", "front", ("h1", "h2", "h3")
ADDRESSES = {name: f"{NETWORK}.{10 + i}" for i, name in enumerate((HEAD, FRONT, *WORKERS))}
GATEWAY = f"{ADDRESSES[FRONT]}:50051"
ENVIRONMENT = (
    "RAY_AUTH_MODE=token",
    f"RAY_AUTH_TOKEN={secrets.token_hex(32)}",
    "RAY_worker_niceness=0",
    "RAY_health_check_period_ms=1000",
    "RAY_health_check_timeout_ms=3000",
    "RAY_health_check_failure_threshold=3",
    # A head that is started again beside other work may take longer than Ray waits by itself.
    "RAY_gcs_rpc_server_reconnect_timeout_s=180",
)
_SIZES = (
    "--memory=2000000000",
    "--object-store-memory=80000000",
    "--disable-usage-stats",
    "--include-log-monitor=false",
)


class Cluster:
    """Ray on all hosts, `grokmesh serve` on the front one."""

    def __init__(self, hosts: Hosts, folder: pathlib.Path, environment: Mapping[str, str], **sections: Any) -> None:
        self.hosts = hosts
        self._environment = (*ENVIRONMENT, *(f"{name}={value}" for name, value in environment.items()))
        self._storage = folder / "gcs"
        self._config = folder / "ray_config.yaml"
        self._config.write_text(
            yaml.safe_dump(
                {
                    "model": {"name": "demo", "checkpoint": str(DEMO)},
                    "cluster": {
                        "address": f"{ADDRESSES[HEAD]}:6379",
                        "compilation_cache": COMPILED,
                        **sections.pop("cluster", {}),
                    },
                    "mesh": {"hosts": 2, "devices_per_host": 1, "data": 1, "model": 2},
                    "gateway": {"address": GATEWAY},
                    "telemetry": {"address": f"{ADDRESSES[FRONT]}:9464"},
                    **sections,
                }
            )
        )

    @property
    def address(self) -> str:
        """Of the gateway."""
        return GATEWAY

    def start(self) -> None:
        """Starts Ray and the service, and waits until it serves."""
        self.start_head()
        self._ray(FRONT, f"--address={ADDRESSES[HEAD]}:6379", "--num-cpus=0")
        for name in WORKERS:
            self.join(name)
        done = self.hosts.execute(
            FRONT,
            "env",
            *self._environment,
            "grokmesh",
            "serve",
            "--config",
            str(self._config),
            "--detach",
            "--timeout",
            "0",
        )
        assert done.returncode == 0, done.stdout + done.stderr
        wait_until(self._ready, 120)

    def lets_in(self, *environment: str) -> bool:
        """Whether Ray lets somebody in who has this environment."""
        command = f"import ray; ray.init('{ADDRESSES[HEAD]}:6379', log_to_driver=False)"
        done = self.hosts.execute(FRONT, "env", *environment, "timeout", "20", "python", "-c", command)
        return done.returncode == 0

    def start_head(self) -> None:
        """Starts Ray's head, which remembers on its disk what it knew."""
        storage = "RAY_gcs_storage=rocksdb", f"RAY_gcs_storage_path={self._storage}"
        self._ray(HEAD, "--head", "--port=6379", "--num-cpus=0", "--include-dashboard=false", environment=storage)

    def end_head(self) -> None:
        """Kills all of Ray's processes on the head."""
        self.hosts.execute(HEAD, "pkill", "-9", "-f", "ray")

    def join(self, name: str) -> None:
        """Starts Ray on a host, anew if something of it is left."""
        self.hosts.execute(name, "ray", "stop", "--force")
        self._ray(name, f"--address={ADDRESSES[HEAD]}:6379", "--num-cpus=1")

    def status(self) -> cluster_pb2.GetStatusResponse:
        """The service's status."""
        with Client(self.address) as client:
            return client.status(timeout=5)

    def heal(self) -> None:
        """Starts Ray again where it has ended by itself, as it does on a host that is too busy to answer the head."""
        for name in WORKERS:
            if not any("raylet/raylet" in words for words in self.hosts.commands(name)):
                self.join(name)

    def name_of(self, address: str) -> str:
        """The host with an address."""
        return next(name for name, own in ADDRESSES.items() if own == address)

    def kill(self, host: cluster_pb2.HostStatus, number: int) -> None:
        """Sends a signal to a host's worker."""
        self.hosts.execute(self.name_of(host.address), "kill", f"-{number}", str(host.pid))

    def _ready(self) -> bool:
        with contextlib.suppress(grpc.RpcError):  # until there is a gateway
            return self.status().replicas[0].state == cluster_pb2.REPLICA_STATE_READY
        return False

    def _ray(self, name: str, *arguments: str, environment: tuple[str, ...] = ()) -> None:
        options = (*arguments, f"--node-ip-address={ADDRESSES[name]}", *_SIZES)
        for attempt in range(3):
            done = self.hosts.execute(
                name, "env", *self._environment, *environment, "ray", "start", *options, timeout=60
            )
            if done.returncode == 0:
                return
            time.sleep(1 + attempt)
        raise AssertionError(done.stdout + done.stderr)


@contextlib.contextmanager
def cluster(folder: pathlib.Path, environment: Mapping[str, str] | None = None, **sections: Any) -> Iterator[Cluster]:
    """A service that serves while the block runs, configured by `sections`; all of its processes have an `environment`."""
    require(ip="iproute2", unshare="util-linux", sshd="openssh-server")
    hosts = Hosts(folder, ADDRESSES)
    try:
        hosts.up()
        hosts.connect(f"{NETWORK}.1")
        made = Cluster(hosts, folder, environment or {}, **sections)
        made.start()
        yield made
    finally:
        hosts.down()


def possible() -> bool:
    """Whether this user may make namespaces."""
    return (
        os.geteuid() == 0 and subprocess.run(["ip", "netns", "list"], capture_output=True, check=False).returncode == 0
    )
