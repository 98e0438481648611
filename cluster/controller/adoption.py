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
from cluster.controller.placement import GROUP_PREFIX, Placement, RunningMesh, WorkerName, answer
from workers.messages.specs import READY, Assignment

_LOG = logging.getLogger(__name__)

#: A worker that does not answer for so long is part of no mesh that serves. Busy ones need their time.
ANSWER_SECONDS = 10.0
#: A worker of another controller: its handle, and what it is part of; None if it does not answer or has failed.
Found = tuple[Any, Assignment | None]


async def adopt() -> tuple[list[RunningMesh], dict[int, int]]:
    """See `Placements.running`. Workers and groups are those of this namespace."""
    names = [name for name in map(WorkerName.parse, await asyncio.to_thread(ray.util.list_named_actors)) if name]
    found = dict(zip(names, await asyncio.gather(*map(_ask, names)), strict=True))
    meshes, kept, epochs = whole_meshes(found, await remembered(), _placed)
    for name in found.keys() - kept:
        _LOG.info("removing %s, which is part of no mesh that serves", name)
        if (host := found[name][0]) is not None:
            ray.kill(host)
    await asyncio.to_thread(_remove_groups, {name.group for name in kept})
    for mesh in meshes:
        _LOG.info("replica %d goes on in epoch %d", mesh.spec.replica, mesh.spec.epoch)
    return meshes, epochs


def whole_meshes(
    found: Mapping[WorkerName, Found], remembered: Mapping[int, int], placed: Callable[..., Placement]
) -> tuple[list[RunningMesh], set[WorkerName], dict[int, int]]:
    """The meshes that go on, at most one of each replica; the workers that belong to them; and the last epoch of each replica,
    which may be one that is `remembered`. `placed` makes a Placement, of its group's name and Placement's other arguments."""
    specs = [one.spec for _, one in found.values() if one is not None and one.spec is not None]
    epochs = dict(sorted([*remembered.items(), *((spec.replica, spec.epoch) for spec in specs)]))  # the last one counts
    meshes: dict[int, RunningMesh] = {}
    kept: set[WorkerName] = set()
    for group in sorted({name.group for name in found}):
        mesh, its = _mesh({name: one for name, one in found.items() if name.group == group}, placed)
        if mesh is not None and mesh.spec.epoch == epochs[mesh.spec.replica] and mesh.spec.replica not in meshes:
            meshes[mesh.spec.replica] = mesh
            kept |= its
    return list(meshes.values()), kept, epochs


def _mesh(
    workers: dict[WorkerName, Found], placed: Callable[..., Placement]
) -> tuple[RunningMesh | None, set[WorkerName]]:
    """The mesh of a placement group's workers, if they are one that serves; and which of them belong to it: those that stand by
    do too, if there is one beside each."""
    generations: dict[int, dict[int, WorkerName]] = collections.defaultdict(dict)
    for name, (_, assignment) in workers.items():
        if assignment is not None:
            generations[name.generation][name.rank] = name
    for generation, ranks in generations.items():
        names = [ranks[rank] for rank in sorted(ranks)]
        assignments = tuple(assignment for name in names if (assignment := workers[name][1]) is not None)
        specs = [assignment.spec for assignment in assignments]
        if specs[0] is None or any(spec is None or spec.epoch != specs[0].epoch for spec in specs):
            continue
        if len(names) != specs[0].mesh.hosts or any(assignment.phase != READY for assignment in assignments):
            continue
        beside = generations.get(generation + 1, {})
        standbys = [beside[rank] for rank in sorted(beside)] if len(beside) == len(names) else []
        placement = placed(
            names[0].group,
            specs[0].mesh,
            [assignment.endpoint.node for assignment in assignments],
            [workers[name][0] for name in names],
            generation,
            [workers[name][0] for name in standbys],
            [assignment.endpoint for assignment in assignments],
        )
        return RunningMesh(placement, assignments), {*names, *standbys}
    return None, set()


def _placed(name: str, *others: Any) -> Placement:
    return Placement(ray.util.get_placement_group(name), name, *others)


async def _ask(name: WorkerName) -> Found:
    try:
        host = await asyncio.to_thread(ray.get_actor, str(name))
    except ValueError:  # it has just ended
        return None, None
    try:
        return host, await answer(host.assignment.remote(), ANSWER_SECONDS, str(name))
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
