"""Where a replica's workers run: one Ray bundle a host; on TPUs, all hosts of one slice, in the slice's order."""

from __future__ import annotations

import asyncio
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from cluster.config import ClusterSection
from workers.assignment import MeshSpec
from workers.host import Host

#: Calls that a worker answers at once: the one that computes, and progress beside it.
_CONCURRENCY = 4


def bundle(mesh: MeshSpec, cpus_per_host: int) -> dict[str, float]:
    """What a worker takes of its host: CPUs, and all the accelerators that the mesh counts there."""
    resources = {"CPU": float(cpus_per_host)}
    if mesh.platform != "cpu":
        resources[mesh.platform.upper()] = float(mesh.devices_per_host)
    return resources


def group_options(mesh: MeshSpec, cluster: ClusterSection) -> dict[str, Any]:
    """The placement group of a replica: a bundle a host, each on a host of its own.

    With `cluster.tpu_pod_type` all of them are on one slice of that kind, and rank r is its worker r: hosts of two slices
    have no interconnect, and JAX numbers a slice's processes so.
    """
    bundles = [bundle(mesh, cluster.cpus_per_host)] * mesh.hosts
    if cluster.tpu_pod_type is None:
        return {"bundles": bundles, "strategy": "STRICT_SPREAD"}
    return {
        "bundles": bundles,
        "topology_strategy": {"ray.io/tpu-slice-name": "STRICT_PACK", "ray.io/node-id": "STRICT_SPREAD"},
        "bundle_label_selector": [
            {"ray.io/tpu-pod-type": cluster.tpu_pod_type, "ray.io/tpu-worker-id": str(rank)}
            for rank in range(mesh.hosts)
        ],
    }


class Placement:
    """The workers of one replica in one epoch, in rank order. They end with `remove`."""

    def __init__(self, group: PlacementGroup, hosts: list[Any]) -> None:
        self.group = group
        self.hosts = hosts

    @classmethod
    async def create(cls, mesh: MeshSpec, cluster: ClusterSection) -> Placement:
        """Waits until there are hosts enough, then starts a worker on each."""
        resources = bundle(mesh, cluster.cpus_per_host)
        group = placement_group(**group_options(mesh, cluster))
        try:
            while not await asyncio.to_thread(group.wait, 1):
                pass
        except BaseException:
            remove_placement_group(group)
            raise
        hosts = [
            Host.options(  # type: ignore[attr-defined]
                num_cpus=cluster.cpus_per_host,
                resources={name: count for name, count in resources.items() if name not in ("CPU", "GPU")},
                num_gpus=resources.get("GPU", 0),
                max_concurrency=_CONCURRENCY,
                max_restarts=0,
                scheduling_strategy=PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=rank),
            ).remote()
            for rank in range(mesh.hosts)
        ]
        return cls(group, hosts)

    def remove(self) -> None:
        """Kills all workers and frees their hosts."""
        for host in self.hosts:
            ray.kill(host)
        remove_placement_group(self.group)
