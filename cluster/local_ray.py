"""A Ray cluster on this machine: one Ray node stands for each host.

It lives in a process and a session of its own, out of reach of a terminal's signals, and ends when the process that asked
for it does, however that ends.
"""

from __future__ import annotations

import contextlib
import logging
import os
import pathlib
import secrets
import stat
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
#: Characters that the folder of Ray's files may have: sockets lie there, and the path of a socket has at most 107 bytes.
_LONGEST_FOLDER = 36
_ENVIRONMENT = {
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "RAY_AUTH_MODE": "token",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    # Ray's own is 15: whatever else runs on a host would leave workers next to nothing.
    "RAY_worker_niceness": "0",
}


class LocalClusterError(RuntimeError):
    """Ray does not start on this machine."""


def prepare_environment() -> None:
    """Sets what Ray reads when it is imported. Must come before that, in the process that will use a local cluster.

    Other users of this machine don't know the cluster's token, so they can't make it do anything; nor do they see its files.

    Raises:
      LocalClusterError: Ray's folder can't be had.
    """
    os.environ.update(_ENVIRONMENT, RAY_AUTH_TOKEN=secrets.token_hex(32))
    folder = os.environ.get("RAY_TMPDIR")
    if folder is None or len(folder) > _LONGEST_FOLDER:
        os.environ["RAY_TMPDIR"] = str(_own_folder())


def _own_folder() -> pathlib.Path:
    """A folder for Ray's files that is this user's alone. Ray's own, /tmp/ray, belongs to the user that had it first."""
    name = f"grokmesh-{os.getuid()}"
    for base in (tempfile.gettempdir(), "/tmp"):
        folder = pathlib.Path(base) / name
        if len(str(folder)) <= _LONGEST_FOLDER:
            break
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        status = folder.lstat()
    except OSError as error:
        raise LocalClusterError(
            f"{folder} can't be made: {error}; set RAY_TMPDIR to a short folder of yours"
        ) from error
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid():
        raise LocalClusterError(f"{folder} is another user's; set RAY_TMPDIR to a short folder of yours")
    folder.chmod(0o700)
    return folder


@contextlib.contextmanager
def local_cluster(hosts: int, cpus_per_host: int) -> Iterator[str]:
    """Runs a cluster of `hosts` nodes while the block runs, and gives its address. Raises LocalClusterError."""
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "cluster.local_ray", str(hosts), str(cpus_per_host)],
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
        process.stdout.close()


_READY = "local Ray cluster at "


def _main() -> None:
    """Runs the cluster until standard input ends."""
    from ray.cluster_utils import Cluster

    # Else it speaks of clusters that were here before, in lines of its own.
    logging.getLogger("ray").setLevel(logging.ERROR)
    hosts, cpus_per_host = map(int, sys.argv[1:])
    cluster = Cluster()
    try:
        try:
            _add_nodes(cluster, hosts, cpus_per_host)
        except Exception:
            # Ray gives a node 30 s, a busy machine takes longer, and Ray's error has no class of its own.
            cluster.shutdown()
            cluster = Cluster()
            _add_nodes(cluster, hosts, cpus_per_host)
        print(f"{_READY}{cluster.address}", flush=True)
        sys.stdin.read()
    finally:
        cluster.shutdown()


def _add_nodes(cluster: Any, hosts: int, cpus_per_host: int) -> None:
    for _ in range(hosts):
        cluster.add_node(num_cpus=cpus_per_host, **_NODE)


if __name__ == "__main__":
    _main()
