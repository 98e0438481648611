"""A Ray cluster of one head that its autoscaler enlarges by fake hosts, for as long as standard input is open.

Prints its address, then, whenever a line comes, how many nodes are alive.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import pathlib
import sys
import tempfile
from typing import Any

from tests.support.ports import free_port

os.environ.update(
    RAY_FAKE_CLUSTER="1",
    AUTOSCALER_UPDATE_INTERVAL_S="1",
    RAY_enable_autoscaler_v2="1",
    RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER="0",
    RAY_AUTH_MODE="disabled",
    RAY_USAGE_STATS_ENABLED="0",
    RAY_worker_niceness="0",
)
_HEAD_ID = "f" * 51 + "00000"
_HEAD_TYPE = "ray.head.default"  # the fake provider knows no other
_IDLE_MINUTES = 0.05
_NODE_MEMORY = {"memory": 500_000_000, "object_store_memory": 80_000_000}


def _config(port: int) -> dict[str, Any]:
    lists = (
        "cluster_synced_files", "rsync_exclude", "rsync_filter", "initialization_commands", "setup_commands",
        "head_setup_commands", "worker_setup_commands", "head_start_ray_commands", "worker_start_ray_commands",
    )  # fmt: skip
    return {
        "cluster_name": "fake",
        "max_workers": 2,
        "upscaling_speed": 100.0,
        "idle_timeout_minutes": _IDLE_MINUTES,
        "docker": {},
        "auth": {},
        "provider": {
            "type": "external",
            "module": "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider",
            "use_node_id_as_ip": True,
            "disable_node_updaters": True,
            "disable_launch_config_check": True,
            "launch_multiple": True,
            "head_node_id": _HEAD_ID,
            "gcs_address": f"127.0.0.1:{port}",
        },
        "head_node_type": _HEAD_TYPE,
        "available_node_types": {
            _HEAD_TYPE: {"resources": {"CPU": 1}, "node_config": {}, "max_workers": 0},
            "host": {
                "resources": {"CPU": 1, "object_store_memory": 80_000_000},
                "node_config": {}, "min_workers": 0, "max_workers": 2,
            },
        },
        "file_mounts": {},
        "file_mounts_sync_continuously": False,
        **{name: [] for name in lists},
    }  # fmt: skip


def main() -> None:
    """Runs the cluster until standard input ends."""
    import ray
    from ray.cluster_utils import Cluster

    port = free_port("127.0.0.1")
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        path = pathlib.Path(folder) / "autoscaling.json"
        path.write_text(json.dumps(_config(port)))
        ids = {"RAY_OVERRIDE_NODE_ID_FOR_TESTING": _HEAD_ID, "RAY_CLOUD_INSTANCE_ID": _HEAD_ID}
        head: dict[str, Any] = {
            "num_cpus": 1,
            "include_dashboard": False,
            "node_ip_address": "127.0.0.1",
            "gcs_server_port": port,
            "autoscaling_config": str(path),
            "env_vars": {**ids, "RAY_NODE_TYPE_NAME": _HEAD_TYPE},
            **_NODE_MEMORY,
        }
        cluster = Cluster(initialize_head=True, head_node_args=head)
        stack.callback(cluster.shutdown)
        ray.init(address=cluster.address, log_to_driver=False, logging_level=logging.ERROR)
        stack.callback(ray.shutdown)
        node: Any = ray._private.worker.global_worker.node
        stack.callback(_end_session, node.get_session_dir_path())
        print("address:", cluster.address, flush=True)
        for _ in sys.stdin:
            print("nodes:", sum(found["Alive"] for found in ray.nodes()), flush=True)


def _end_session(directory: str) -> None:
    """Ends the processes that the fake provider started and forgets to end."""
    import psutil  # type: ignore[import-untyped]  # one of Ray's own

    for process in psutil.process_iter(["cmdline"]):
        if process.pid != os.getpid() and any(directory in word for word in process.info["cmdline"] or ()):
            with contextlib.suppress(psutil.Error):
                process.kill()


if __name__ == "__main__":
    main()
