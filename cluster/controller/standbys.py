"""Workers that stand by: one a host, with everything imported and traced, for whichever replica is placed there next."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Container, Iterable, Sequence
from typing import Any

import ray.exceptions

from cluster.controller.ray_calls import answer
from workers.messages.specs import Endpoint, EngineSpec, MeshSpec, ModelSpec

_LOG = logging.getLogger(__name__)

#: Seconds that one has to take a place.
TAKE_SECONDS = 10.0


class Standbys:
    """At most one a node. They take no resources of their hosts, so they are there beside the workers that compute."""

    def __init__(self, start: Callable[[str], Any], kill: Callable[[Any], None]) -> None:
        """`start` starts a worker on a node, `kill` ends one."""
        self._start, self._kill = start, kill
        self._there: dict[str, Any] = {}

    @property
    def nodes(self) -> set[str]:
        return set(self._there)

    def put(self, node: str, host: Any) -> None:
        """One that stands by on a node already."""
        if node in self._there:
            self._kill(host)
        else:
            self._there[node] = host

    async def prepare(self, nodes: Iterable[str], model: ModelSpec, mesh: MeshSpec, engine: EngineSpec) -> None:
        """Has one on each of these nodes, prepared for this."""

        async def one(node: str) -> None:
            host = self._there.get(node)
            if host is None:
                host = self._there[node] = self._start(node)
            try:
                await host.prepare.remote(model, mesh, engine)
            except (OSError, ray.exceptions.RayError) as error:
                if self._there.get(node) is host:
                    _LOG.warning("no worker stands by on node %s: %s", node, error)
                    self._kill(self._there.pop(node))

        await asyncio.gather(*map(one, sorted(nodes)))

    async def answers(self, node: str, seconds: float) -> bool:
        """Whether one on a node is there, and says so within `seconds`."""
        host = self._there.get(node)
        try:
            return host is not None and bool(await answer(host.progress.remote(), seconds, node))
        except (OSError, ray.exceptions.RayError):
            return False

    async def take(self, node: str, before: Endpoint | None) -> Any:
        """The one on a node. If it is to replace the worker that was there `before`, it has ended that one, and has its
        accelerators; else it has all of its host's. None if there is none, or it does not answer."""
        host = self._there.pop(node, None)
        if host is not None:
            try:
                await answer(host.replace.remote(before), TAKE_SECONDS, node)
            except (OSError, ray.exceptions.RayError):
                self._kill(host)
                return None
            except BaseException:
                self._kill(host)
                raise
        return host

    async def place(self, nodes: Sequence[str], whole: Container[str], start: Callable[[int], Any]) -> list[Any]:
        """A worker on each of these nodes, in rank order: the one that stands by, where a worker has the `whole` node; else one
        that `start` starts, of its rank."""
        hosts: dict[int, Any] = {}

        async def fill(rank: int, node: str) -> None:
            standby = await self.take(node, None) if node in whole else None
            hosts[rank] = standby or start(rank)

        try:
            await asyncio.gather(*map(fill, range(len(nodes)), nodes))
        except BaseException:
            for host in hosts.values():
                self._kill(host)
            raise
        return [hosts[rank] for rank in range(len(nodes))]

    def keep(self, nodes: set[str]) -> None:
        """Ends those on other nodes."""
        for node in self.nodes - nodes:
            self._kill(self._there.pop(node))
