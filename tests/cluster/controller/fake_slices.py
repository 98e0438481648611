"""Places replicas on a Ray cluster of fake TPU hosts and prints, as JSON, on which slice and worker each rank of one of TPUs
came to lie, and whether hosts of one of CPUs keep their ranks.

The cluster has one and a half slices of the kind: a whole one, and a host of another that has lost its second.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
from typing import Any
from unittest import mock

os.environ.update(RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER="0", RAY_AUTH_MODE="disabled", RAY_USAGE_STATS_ENABLED="0")

import ray
from ray.cluster_utils import Cluster

from cluster.config.schema import ClusterSection
from cluster.controller import ray_placements
from cluster.controller.ray_placements import RayPlacements
from workers.messages.specs import MeshSpec

POD_TYPE, TOPOLOGY = "v5p-16", "2x2x2"  # two hosts of four chips
_MEMORY: dict[str, Any] = {"memory": 500_000_000, "object_store_memory": 80_000_000}


def _add_host(cluster: Cluster, slice_name: str, worker: int) -> None:
    environment = {
        "TPU_NAME": slice_name, "TPU_WORKER_ID": str(worker), "TPU_ACCELERATOR_TYPE": POD_TYPE, "TPU_TOPOLOGY": TOPOLOGY,
    }  # fmt: skip
    # Ray looks at its caller's environment for labels, and at the new node's for its workers.
    with mock.patch.dict(os.environ, environment):
        cluster.add_node(num_cpus=2, resources={"TPU": 4}, env_vars=environment, **_MEMORY)


async def _place() -> list[dict[str, Any]]:
    mesh = MeshSpec("tpu", hosts=2, devices_per_host=4, data=1, model=8, rules="tensor")
    placement = await RayPlacements(ClusterSection(tpu_pod_type=POD_TYPE)).create(0, mesh, (), (), None)
    assert placement is not None
    try:
        labels = {node["NodeID"]: node["Labels"] for node in ray.nodes()}
        table = ray.util.placement_group_table(placement.group)
        await asyncio.gather(*(host.endpoint.remote() for host in placement.hosts))
        nodes = [table["bundles_to_node_id"][rank] for rank in range(mesh.hosts)]
        return [{name: labels[node][f"ray.io/tpu-{name}"] for name in ("slice-name", "worker-id")} for node in nodes]
    finally:
        placement.remove()


async def _place_again() -> list[bool]:
    mesh, placements = MeshSpec("cpu", hosts=2, model=2), RayPlacements(ClusterSection(cpus_per_host=2))

    async def nodes(before: list[str], avoided: tuple[str, ...] = ()) -> list[str]:
        placement = await placements.create(0, mesh, avoided, before, 20)
        assert placement is not None
        placement.remove()
        return placement.nodes

    # Ray takes its time to free the hosts of the placement before; a busy machine, more than is waited for in service.
    with mock.patch.object(ray_placements, "AVOID_SECONDS", 60.0):
        first, second = await nodes([])
        swapped = await nodes([second, first])
        new, stays = await nodes([first, second], avoided=(first,))
    return [swapped == [second, first], stays == second, new not in (first, second)]


def main() -> None:
    """Prints two lists: an entry a rank, and what is true."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False, **_MEMORY})
    try:
        # In an order that is neither the slices' nor the workers'.
        _add_host(cluster, "half", 1)
        _add_host(cluster, "whole", 1)
        _add_host(cluster, "whole", 0)
        ray.init(address=cluster.address, log_to_driver=False, logging_level=logging.ERROR, namespace="test")
        print(json.dumps([asyncio.run(_place()), asyncio.run(_place_again())]))
    finally:
        ray.shutdown()
        cluster.shutdown()


if __name__ == "__main__":
    main()
