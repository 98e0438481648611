"""Ray, as far as a controller needs it to place workers. What a controller that has died still wants is not done."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Sequence
from typing import Any

import ray.exceptions

from cluster.config.schema import Config
from cluster.controller.adoption import ANSWER_SECONDS, GROUP_PREFIX, STANDBY_PREFIX, whole_meshes
from cluster.controller.placement import Placement, RunningMesh
from cluster.controller.ray_calls import answer
from cluster.controller.standbys import Standbys
from tests.simulation.workers import Conditions, SimHost, SimWorker
from tests.simulation.world import SimNetwork, SimNode, SimProcess, World
from workers.messages.specs import MeshSpec


@dataclasses.dataclass
class Cluster:
    """What Ray knows: workers by name, the hosts of each placement group, and the last epoch of each replica."""

    world: World
    conditions: Conditions
    workers: dict[str, SimWorker] = dataclasses.field(default_factory=dict)
    groups: dict[str, list[SimNode]] = dataclasses.field(default_factory=dict)
    epochs: dict[int, int] = dataclasses.field(default_factory=dict)

    def free(self, group: str) -> None:
        for node in self.groups.pop(group, []):
            node.free = True


class SimPlacements:
    """A `cluster.controller.placement.Placements` of one life of the controller."""

    def __init__(self, cluster: Cluster, controller: SimProcess) -> None:
        self._cluster, self._controller = cluster, controller
        self._standbys = Standbys(self._start_standby, self._kill)

    async def running(self) -> tuple[list[RunningMesh], dict[int, int]]:
        names = [name for name, worker in self._cluster.workers.items() if not worker.process.dead.is_set()]
        found = dict(zip(names, await asyncio.gather(*map(self._ask, names)), strict=True))
        meshes, kept, epochs = whole_meshes(found, self._cluster.epochs, self._placed, self._standbys)
        for name in names:
            if name not in kept and self._controller.runs:
                self._cluster.workers[name].process.die()
        for group in set(self._cluster.groups) - {mesh.placement.name for mesh in meshes}:
            self._cluster.free(group)
        return meshes, epochs

    async def begins(self, replica: int, epoch: int) -> None:
        if self._controller.runs:
            self._cluster.epochs[replica] = epoch

    async def create(
        self, replica: int, mesh: MeshSpec, avoided: tuple[str, ...], before: Sequence[str], seconds: float | None
    ) -> Placement | None:
        world = self._cluster.world
        began = world.loop.time()
        while True:
            fit = [node for node in self._there() if node.free]
            least = 0 if not avoided or world.loop.time() - began > 5 else 1
            tried = (
                [node for node in fit if node.id not in avoided[:count]] for count in range(len(avoided), least - 1, -1)
            )
            chosen = next((nodes for nodes in tried if len(nodes) >= mesh.hosts), None)
            if chosen is not None:
                break
            if seconds is not None and world.loop.time() - began > 5 + seconds:
                return None
            await asyncio.sleep(0.5)
        known = before if len(before) == mesh.hosts else [""] * mesh.hosts
        by_id = {node.id: node for node in chosen}
        stay = [by_id.pop(name, None) for name in known]
        others = world.rng.sample(list(by_id.values()), stay.count(None))
        nodes = [node or others.pop() for node in stay]
        group = f"{GROUP_PREFIX}{replica}-{next(world.numbers)}"
        self._cluster.groups[group] = nodes
        for node in nodes:
            node.free = False
        names = [node.id for node in nodes]
        try:
            hosts = await self._standbys.place(
                names, names, lambda rank: self._start(f"{group}-worker-{rank}", nodes[rank])
            )
        except BaseException:
            if self._controller.runs:
                self._cluster.free(group)
            raise
        return self._placed(group, mesh, names, hosts, self._standbys)

    async def spares_beside(self, mesh: MeshSpec, avoided: frozenset[str]) -> bool:
        return sum(node.id not in avoided for node in self._there()) >= mesh.hosts

    async def room(self, replica: int, mesh: MeshSpec, nodes: Sequence[str]) -> None:
        del replica
        while sum(node.free and node.id not in nodes for node in self._there()) < mesh.hosts - len(nodes):
            await asyncio.sleep(0.5)

    async def stand_by(self, placement: Placement, config: Config) -> None:
        there = self._there()
        self._standbys.keep({node.id for node in there})
        spares = [node.id for node in there if node.free][: config.mesh.hosts]
        await self._standbys.prepare({*placement.nodes, *spares}, config.model, config.mesh, config.engine)

    def close(self) -> None:
        self._standbys.keep(set())

    def _there(self) -> list[SimNode]:
        world = self._cluster.world
        return [node for node in world.hosts if world.reaches(self._controller.node, node)]

    def _placed(self, *arguments: Any) -> Placement:
        return SimPlacement(self._cluster, self._controller, *arguments)

    def _start(self, name: str, node: SimNode) -> SimHost:
        """A new worker. On a host without power it is dead from the beginning."""
        worker = self._cluster.workers[name] = SimWorker(node, self._cluster.conditions)
        if not node.on or not self._controller.runs:
            worker.process.die(silently=not node.on)
        return SimHost(self._controller, worker)

    def _start_standby(self, name: str) -> SimHost:
        node = next(node for node in self._cluster.world.hosts if node.id == name)
        return self._start(f"{STANDBY_PREFIX}{next(self._cluster.world.numbers)}", node)

    def _kill(self, host: SimHost) -> None:
        if self._controller.runs:
            host.worker.process.die()

    async def _ask(self, name: str) -> tuple[Any, Any]:
        host: Any = SimHost(self._controller, self._cluster.workers[name])
        try:
            return host, await answer(host.assignment.remote(), ANSWER_SECONDS, name)
        except (OSError, ray.exceptions.RayError):
            return host, None


class SimPlacement(Placement):
    """The project's own, but for what it asks of Ray."""

    def __init__(self, cluster: Cluster, controller: SimProcess, name: str, *others: Any) -> None:
        unused: Any = None
        super().__init__(unused, name, *others)
        self._network = SimNetwork(controller)
        self._cluster, self._controller = cluster, controller

    def _with(self, hosts: list[Any]) -> Placement:
        arguments = self.name, self._mesh, self.nodes, hosts, self._standbys
        return SimPlacement(self._cluster, self._controller, *arguments)

    def _kill(self, hosts: list[Any]) -> None:
        if self._controller.runs:
            for host in hosts:
                host.worker.process.die()

    def _free(self) -> None:
        if self._controller.runs:
            self._cluster.free(self.name)
