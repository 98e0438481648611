"""A Ray cluster on this machine: one Ray node stands for each host.

It lives in a process and a session of its own, out of reach of a terminal's signals, and ends when the process that asked
for it does, however that ends.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from typing import Any

#: Without these each node claims the machine's memory, and a head on loopback can't be reached by its address.
_NODE: dict[str, Any] = {
    "memory": 2_000_000_000,
    "object_store_memory": 80_000_000,
    "num_gpus": 0,
    "include_dashboard": False,
}
#: Characters that the folder of Ray's files may have, and one that has fewer.
_LONGEST_FOLDER, _SHORT_FOLDER = 36, "/tmp"
_ENVIRONMENT = {
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "RAY_AUTH_MODE": "token",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}


class LocalClusterError(RuntimeError):
    """Ray does not start on this machine."""


def prepare_environment() -> None:
    """Sets what Ray reads when it is imported. Must come before that, in the process that will use a local cluster.

    Who does not know the cluster's token, as other users of this machine don't, can't make it do anything.
    """
    os.environ.update(_ENVIRONMENT, RAY_AUTH_TOKEN=secrets.token_hex(32))
    if len(os.environ.get("RAY_TMPDIR", tempfile.gettempdir())) > _LONGEST_FOLDER:
        # Ray's sockets lie there, and the path of a socket has at most 107 bytes.
        os.environ["RAY_TMPDIR"] = _SHORT_FOLDER


@contextlib.contextmanager
def local_cluster(hosts: int, cpus_per_host: int) -> Iterator[str]:
    """Runs a cluster of `hosts` nodes while the block runs, and gives its address. Raises LocalClusterError."""
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "cluster.local", str(hosts), str(cpus_per_host)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        for line in process.stdout:
            if line.startswith(_READY):
                yield line.removeprefix(_READY).strip()
                return
        raise LocalClusterError(f"the local Ray cluster ended with code {process.wait()}; its words are above")
    finally:
        process.stdin.close()
        process.wait()


_READY = "local Ray cluster at "


def _main() -> None:
    """Runs the cluster until standard input ends."""
    from ray.cluster_utils import Cluster

    hosts, cpus_per_host = map(int, sys.argv[1:])
    cluster = Cluster()
    try:
        for _ in range(hosts):
            cluster.add_node(num_cpus=cpus_per_host, **_NODE)
        print(f"{_READY}{cluster.address}", flush=True)
        sys.stdin.read()
    finally:
        cluster.shutdown()


if __name__ == "__main__":
    _main()
