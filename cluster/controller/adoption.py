"""What becomes of workers that another controller has left: whole meshes that serve go on as they are, all else goes."""

from __future__ import annotations

import asyncio
import collections
import logging
from collections.abc import Callable, Mapping
from typing import Any

import ray
import ray.exceptions
from ray.util.placement_group import placement_group_table, remove_placement_group

from cluster.controller.epochs import remembered
from cluster.controller.placement import Placement, RunningMesh
from cluster.controller.ray_calls import answer, kill
from cluster.controller.standbys import Standbys
from workers.messages.specs import READY, Assignment, RankSpec

_LOG = logging.getLogger(__name__)

#: Of the names of replicas' placement groups, and of workers in them, and of workers that stand by.
GROUP_PREFIX, STANDBY_PREFIX = "replica-", "standby-"
#: A worker that does not answer for so long is part of no mesh that serves. Busy ones need their time.
ANSWER_SECONDS = 10.0
#: A worker of another controller: its handle, and what it is part of; None if it does not answer or has failed.
Found = tuple[Any, Assignment | None]


async def adopt(standbys: Standbys) -> tuple[list[RunningMesh], dict[int, int]]:
    """See `Placements.running`. Workers and groups are those of this namespace; `standbys` gets those that stand by."""
    names = await asyncio.to_thread(ray.util.list_named_actors)
    names = [name for name in names if name.startswith((GROUP_PREFIX, STANDBY_PREFIX))]
    found = dict(zip(names, await asyncio.gather(*map(_ask, names)), strict=True))

    def placed(name: str, *others: Any) -> Placement:
        return Placement(ray.util.get_placement_group(name), name, *others)

    meshes, kept, epochs = whole_meshes(found, await remembered(), placed, standbys)
    for name in found.keys() - kept:
        _LOG.info("removing %s, which is part of no mesh that serves", name)
        if (host := found[name][0]) is not None:
            kill(host)
    await asyncio.to_thread(_remove_groups, {mesh.placement.name for mesh in meshes})
    for mesh in meshes:
        _LOG.info("replica %d goes on in epoch %d", mesh.spec.replica, mesh.spec.epoch)
    return meshes, epochs


def whole_meshes(
    found: Mapping[str, Found],
    remembered: Mapping[int, int],
    placed: Callable[..., Placement],
    standbys: Standbys,
) -> tuple[list[RunningMesh], set[str], dict[int, int]]:
    """Of the workers `found` by name: the meshes that go on, at most one of each replica; the names of those that belong to
    them, or stand by, which `standbys` gets; and the last epoch of each replica, which may be one that is `remembered`.
    `placed` makes a Placement, of its group's name and Placement's other arguments."""
    epochs = dict(remembered)
    groups: dict[tuple[str, int], dict[str, tuple[Any, Assignment]]] = collections.defaultdict(dict)
    meshes: dict[int, RunningMesh] = {}
    kept: set[str] = set()
    for name, (host, assignment) in found.items():
        if assignment is None:
            continue
        if spec := assignment.spec:
            epochs[spec.replica] = max(epochs.get(spec.replica, 0), spec.epoch)
            groups[spec.group, spec.epoch][name] = host, assignment
        elif name.startswith(STANDBY_PREFIX):
            standbys.put(assignment.endpoint.node, host)
            kept.add(name)
    for _, workers in sorted(groups.items()):
        mesh = _mesh(list(workers.values()), placed, standbys)
        if mesh is not None and mesh.spec.epoch == epochs[mesh.spec.replica] and mesh.spec.replica not in meshes:
            meshes[mesh.spec.replica] = mesh
            kept |= workers.keys()
    return list(meshes.values()), kept, epochs


def _mesh(
    workers: list[tuple[Any, Assignment]], placed: Callable[..., Placement], standbys: Standbys
) -> RunningMesh | None:
    """The mesh of the workers of a placement group in an epoch, if it is a whole one that serves."""
    by_rank = {assignment.spec.rank: (host, assignment) for host, assignment in workers if assignment.spec is not None}
    hosts, assignments = zip(*(by_rank[rank] for rank in sorted(by_rank)), strict=True)
    spec: RankSpec = assignments[0].spec
    if len(hosts) != spec.mesh.hosts or any(assignment.phase != READY for assignment in assignments):
        return None
    endpoints = [assignment.endpoint for assignment in assignments]
    nodes = [endpoint.node for endpoint in endpoints]
    return RunningMesh(placed(spec.group, spec.mesh, nodes, list(hosts), standbys, endpoints), assignments)


async def _ask(name: str) -> Found:
    try:
        host = await asyncio.to_thread(ray.get_actor, name)
    except ValueError:  # it has just ended
        return None, None
    try:
        return host, await answer(host.assignment.remote(), ANSWER_SECONDS, name)
    except (OSError, ray.exceptions.RayError) as error:
        _LOG.warning("%s: %s", name, error)
        return host, None


def _remove_groups(kept: set[str]) -> None:
    for row in placement_group_table().values():
        name: str = row["name"]
        if name.startswith(GROUP_PREFIX) and name not in kept and row["state"] != "REMOVED":
            try:
                group = ray.util.get_placement_group(name)
            except ValueError:  # another service's, in another namespace
                continue
            remove_placement_group(group)
