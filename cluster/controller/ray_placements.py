"""Finds hosts for replicas on a Ray cluster: one bundle a host; on TPUs, all hosts of one slice, in the slice's order."""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import logging
import secrets
from collections.abc import Mapping, Sequence
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup, placement_group, placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from cluster.config.schema import ClusterSection, Config
from cluster.controller.adoption import GROUP_PREFIX, STANDBY_PREFIX, adopt
from cluster.controller.epochs import remember
from cluster.controller.placement import Placement, RunningMesh
from cluster.controller.ray_calls import kill
from cluster.controller.standbys import Standbys
from workers.host.actor import Host
from workers.messages.specs import MeshSpec

_LOG = logging.getLogger(__name__)

#: Seconds to wait for hosts other than those that are to be avoided.
AVOID_SECONDS = 5.0
#: Seconds of waiting for hosts after which the log says what no node has.
PUZZLED_SECONDS = 20.0
#: Seconds until Ray knows everywhere what was freed. What is reserved earlier fails at first, and then waits for seconds.
FREED_SECONDS = 0.3
#: Calls that a worker answers at once: the one that computes, and progress beside it.
_CONCURRENCY = 4


class RayPlacements:
    """Places replicas on the nodes of a Ray cluster."""

    def __init__(self, cluster: ClusterSection) -> None:
        self._cluster = cluster
        self._standbys = Standbys(_start_standby, kill)

    async def running(self) -> tuple[list[RunningMesh], dict[int, int]]:
        """See Placements."""
        return await adopt(self._standbys)

    async def begins(self, replica: int, epoch: int) -> None:
        """See Placements."""
        await remember(replica, epoch)

    async def create(
        self, replica: int, mesh: MeshSpec, avoided: tuple[str, ...], before: Sequence[str], seconds: float | None
    ) -> Placement | None:
        """See Placements. What is wanted, but need not be, has AVOID_SECONDS to be there."""
        cluster, group, name = self._cluster, None, _group_name(replica)
        await asyncio.sleep(FREED_SECONDS)
        nodes = await asyncio.to_thread(ray.nodes)
        there = {node["NodeID"] for node in nodes if node["Alive"]}
        for count in range(len(avoided), -1, -1):
            without = frozenset(avoided[:count])
            stay = [node if node in there - without else "" for node in before] if len(before) == mesh.hosts else []
            if (without or any(stay)) and spares_beside(nodes, mesh, cluster, without):
                group = await _reserve(name, group_options(mesh, cluster, without, stay), AVOID_SECONDS)
                break
        group = group or await _reserve(name, group_options(mesh, cluster), seconds)
        if group is None:
            return None
        try:
            table: dict[int, str] = (await asyncio.to_thread(placement_group_table, group))["bundles_to_node_id"]
            placed = [table.get(rank, "") for rank in range(mesh.hosts)]
            start = functools.partial(_start_worker, group, name, mesh, cluster)
            hosts = await self._standbys.place(placed, whole_nodes(nodes, mesh), start)
        except BaseException:
            remove_placement_group(group)
            raise
        return Placement(group, name, mesh, placed, hosts, self._standbys)

    async def spares_beside(self, mesh: MeshSpec, avoided: frozenset[str]) -> bool:
        """See Placements."""
        return spares_beside(await asyncio.to_thread(ray.nodes), mesh, self._cluster, avoided)

    async def room(self, replica: int, mesh: MeshSpec, nodes: Sequence[str]) -> None:
        """See Placements. What is waited for is reserved, so that Ray's autoscaler adds it."""
        missing = dataclasses.replace(mesh, hosts=mesh.hosts - len(nodes))
        options = group_options(missing, self._cluster, frozenset(nodes))
        group = await _reserve(_group_name(replica), options, None)
        assert group is not None
        remove_placement_group(group)

    async def stand_by(self, placement: Placement, config: Config) -> None:
        """See Placements. On free nodes only where a worker takes all accelerators: which it would get of some is not known.
        As many of them as a mesh has hosts; none where replicas come and go, as Ray's autoscaler removes no node that has a
        worker."""
        nodes, groups = await asyncio.to_thread(lambda: (ray.nodes(), placement_group_table()))
        used = {
            node for row in groups.values() if row["state"] != "REMOVED" for node in row["bundles_to_node_id"].values()
        }
        alive = {node["NodeID"] for node in nodes if node["Alive"]}
        scales = config.autoscaling.max_replicas is not None
        self._standbys.keep(alive & used if scales else alive)
        free = whole_nodes(nodes, config.mesh) & _fitting(nodes, config.mesh, self._cluster) - used
        wanted = {*placement.nodes, *sorted(free)[: 0 if scales else config.mesh.hosts]}
        await self._standbys.prepare(wanted, config.model, config.mesh, config.engine)

    def close(self) -> None:
        """See Placements."""
        self._standbys.keep(set())


def _start_worker(group: PlacementGroup, name: str, mesh: MeshSpec, cluster: ClusterSection, rank: int) -> Any:
    """A new worker in a bundle of the group of this name. It outlives the controller that starts it."""
    strategy = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=rank)
    resources = bundle(mesh, cluster.cpus_per_host)
    return _start(
        f"{name}-worker-{rank}",
        scheduling_strategy=strategy,
        num_cpus=resources.pop("CPU"),
        num_gpus=resources.pop("GPU", 0),
        resources=resources,
    )


def _start_standby(node: str) -> Any:
    """A new worker on a node that takes none of its resources."""
    strategy = NodeAffinitySchedulingStrategy(node, soft=False)
    return _start(f"{STANDBY_PREFIX}{node}-{secrets.token_hex(4)}", scheduling_strategy=strategy, num_cpus=0)


def _start(name: str, **options: Any) -> Any:
    life = {"name": name, "lifetime": "detached", "max_restarts": 0, "max_concurrency": _CONCURRENCY}
    return Host.options(**life, **options).remote()  # type: ignore[attr-defined]


def _group_name(replica: int) -> str:
    return f"{GROUP_PREFIX}{replica}-{secrets.token_hex(4)}"


def bundle(mesh: MeshSpec, cpus_per_host: int) -> dict[str, float]:
    """What a worker takes of its host: CPUs, and all the accelerators that the mesh counts there."""
    resources = {"CPU": float(cpus_per_host)}
    if mesh.platform != "cpu":
        resources[mesh.platform.upper()] = float(mesh.devices_per_host)
    return resources


def group_options(
    mesh: MeshSpec, cluster: ClusterSection, avoided: frozenset[str] = frozenset(), stay: Sequence[str] = ()
) -> dict[str, Any]:
    """The placement group of a replica: a bundle a host, each on a host of its own, none on nodes `avoided`. `stay` has a node
    for each rank, or nothing where it may be any.

    With `cluster.tpu_pod_type` all of them are on one slice of that kind, and rank r is its worker r: hosts of two slices
    have no interconnect, and JAX numbers a slice's processes so.
    """
    bundles = [bundle(mesh, cluster.cpus_per_host)] * mesh.hosts
    others = {"ray.io/node-id": f"!in({', '.join(sorted(avoided))})"} if avoided else {}
    if cluster.tpu_pod_type is None:
        options: dict[str, Any] = {"bundles": bundles, "strategy": "STRICT_SPREAD"}
        labels = [{"ray.io/node-id": node} if node else others for node in stay or [""] * mesh.hosts]
        return {**options, "bundle_label_selector": labels} if any(labels) else options
    return {
        "bundles": bundles,
        "topology_strategy": {"ray.io/tpu-slice-name": "STRICT_PACK", "ray.io/node-id": "STRICT_SPREAD"},
        "bundle_label_selector": [
            {"ray.io/tpu-pod-type": cluster.tpu_pod_type, "ray.io/tpu-worker-id": str(rank), **others}
            for rank in range(mesh.hosts)
        ],
    }


async def _reserve(name: str, options: dict[str, Any], seconds: float | None) -> PlacementGroup | None:
    """A placement group once it has its hosts; None if it has not after `seconds`. It outlives the controller."""
    group: PlacementGroup = placement_group(**options, name=name, lifetime="detached")
    loop = asyncio.get_running_loop()
    began = loop.time()
    puzzled = False
    try:
        while not await asyncio.to_thread(group.wait, 1):
            if not puzzled and loop.time() - began > PUZZLED_SECONDS:
                puzzled = True
                if lacking := lacking_labels(options, await asyncio.to_thread(ray.nodes)):
                    _LOG.warning("%s waits for hosts, but no node has %s", name, lacking)
            if seconds is not None and loop.time() - began > seconds:
                remove_placement_group(group)
                return None
    except BaseException:
        remove_placement_group(group)
        raise
    return group


def lacking_labels(options: Mapping[str, Any], nodes: Sequence[Mapping[str, Any]]) -> str:
    """Which labels of those that a placement group selects by no living node has; of a TPU's, who sets them."""
    there = {label for node in nodes if node["Alive"] for label in node.get("Labels", {}).items()}
    wanted = {
        label: None
        for selector in options.get("bundle_label_selector", ())
        for label in selector.items()
        if label[0] != "ray.io/node-id"
    }
    lacking = [f"{name}={value}" for name, value in wanted if (name, value) not in there]
    tpu = any(name.startswith("ray.io/tpu-") for name in lacking)
    advice = "; Ray takes them from what Google sets on TPU hosts, on Kubernetes by its Ray TPU webhook" if tpu else ""
    return ", ".join(lacking) + advice if lacking else ""


def spares_beside(
    nodes: Sequence[Mapping[str, Any]], mesh: MeshSpec, cluster: ClusterSection, avoided: frozenset[str]
) -> bool:
    """Whether a replica could lie on other of Ray's nodes than those, were they free."""
    return len(_fitting(nodes, mesh, cluster) - avoided) >= mesh.hosts


def _fitting(nodes: Sequence[Mapping[str, Any]], mesh: MeshSpec, cluster: ClusterSection) -> set[str]:
    """Those of Ray's nodes that have what a worker takes."""
    wanted = bundle(mesh, cluster.cpus_per_host)
    return {
        node["NodeID"]
        for node in nodes
        if node["Alive"] and all(node["Resources"].get(name, 0) >= count for name, count in wanted.items())
    }


def whole_nodes(nodes: Sequence[Mapping[str, Any]], mesh: MeshSpec) -> set[str]:
    """Those of Ray's nodes of which a worker takes all accelerators."""
    name = mesh.platform.upper()
    return {
        node["NodeID"]
        for node in nodes
        if mesh.platform == "cpu" or node["Resources"].get(name, 0) == mesh.devices_per_host
    }
