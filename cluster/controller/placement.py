"""Where a replica's workers run: one Ray bundle a host; on TPUs, all hosts of one slice, in the slice's order."""

from __future__ import annotations

import asyncio
import collections
import dataclasses
import logging
import secrets
import shutil
from collections.abc import AsyncGenerator, Sequence
from typing import Any, Protocol

import ray
import ray.exceptions
from ray.util.placement_group import (
    PlacementGroup,
    remove_placement_group,
)
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cluster.config.schema import Config
from cluster.controller.ray_calls import answer, kill
from cluster.controller.standbys import Standbys
from cluster.network import REAL, Network
from workers.messages.specs import Assignment, Endpoint, MeshSpec, Progress, RankSpec

_LOG = logging.getLogger(__name__)

#: Seconds that a new worker may take to start.
START_SECONDS = 60.0
#: A worker that does not answer for so long may be lost.
SILENT_SECONDS = 1.5
#: In which a host accepts a connection, even if the first packet is lost.
REACH_SECONDS = 1.3
#: In which a worker has to answer, or its process to show that it lives, so that its host is not blamed for a loss.
BRIEF_SECONDS = 0.5
#: Bytes of a trace that are fetched at a time: what Ray unpacks holds the controller's loop up.
TRACE_PART = 256 * 1024
#: Seconds that hosts have to remove their weights caches.
FORGET_SECONDS = 30.0


class HostError(RuntimeError):
    """What went wrong at one host, or with it. `raised`: whether its worker itself raised the error."""

    def __init__(self, rank: int, error: BaseException, *, raised: bool = False) -> None:
        super().__init__(f"host {rank}: {error}")
        self.rank = rank
        self.error = error
        self.raised = raised


@dataclasses.dataclass(frozen=True)
class RunningMesh:
    """A mesh that another controller has left, and that goes on: its workers, and what they are part of, in rank order."""

    placement: Placement
    assignments: tuple[Assignment, ...]

    @property
    def spec(self) -> RankSpec:
        """The leader's."""
        spec = self.assignments[0].spec
        assert spec is not None
        return spec


class Placements(Protocol):
    """Finds hosts for replicas."""

    async def running(self) -> tuple[list[RunningMesh], dict[int, int]]:
        """The meshes that another controller has left, at most one for each replica, and the last epoch of each replica. All
        else that it has left is removed, but for the workers that stand by."""

    async def begins(self, replica: int, epoch: int) -> None:
        """Remembers that an epoch begins, for the controllers that come after this one."""

    async def create(
        self, replica: int, mesh: MeshSpec, avoided: tuple[str, ...], before: Sequence[str], seconds: float | None
    ) -> Placement | None:
        """Waits until there are hosts enough, then starts a worker on each where none stands by; None if there are not within
        `seconds`. On the nodes `avoided` only if there are too few others, then rather on the last of them. Nodes on which the
        replica lay `before` have the ranks that they had, for which they have the weights, if it has as many hosts as then."""

    async def spares_beside(self, mesh: MeshSpec, avoided: frozenset[str]) -> bool:
        """Whether a mesh could lie on other nodes than those, were they free."""

    async def room(self, replica: int, mesh: MeshSpec, nodes: Sequence[str]) -> None:
        """Waits until there are so many more hosts that a mesh that lies on `nodes` could be one like `mesh`."""

    async def stand_by(self, placement: Placement, config: Config) -> None:
        """Has a worker stand by on each node of a placement, and on free ones for when one of those is lost."""

    def close(self) -> None:
        """Ends the workers that stand by."""


class Placement:
    """The workers of one replica in one epoch, in rank order.

    `nodes` are the ids of their Ray nodes, as they were when the hosts were reserved: of a node that is lost Ray soon says
    nothing, or names the one that its bundle went to.
    """

    def __init__(
        self,
        group: PlacementGroup,
        name: str,
        mesh: MeshSpec,
        nodes: list[str],
        hosts: list[Any],
        standbys: Standbys,
        endpoints: Sequence[Endpoint] = (),
        network: Network = REAL,
    ) -> None:
        """`name` is the group's."""
        self.group = group
        self.name = name
        self.nodes = nodes
        self.hosts = hosts
        self._mesh = mesh
        self._standbys = standbys
        self._endpoints = list(endpoints)
        self._network = network
        self._reached: asyncio.Future[list[bool]] | None = None

    def dump_stacks(self) -> None:
        """Has each worker that still can write to its log what its threads are doing."""
        for host in self.hosts:
            host.dump_stacks.remote()

    async def endpoints(self, weights_cache: str | None) -> list[Endpoint]:
        """Where the workers can be reached, and the weights cache of each, if it is to have one. Raises HostError for one that
        does not answer in START_SECONDS, or is not what the others are."""
        found = await self.ask("endpoint", [weights_cache] * len(self.hosts), seconds=START_SECONDS)
        self._endpoints = found
        for rank, endpoint in enumerate(found):
            if endpoint.code != found[0].code:
                error = OSError(
                    f"it runs other code than host 0: {endpoint.code} and {found[0].code}; install the same"
                )
                raise HostError(rank, error)
        return found

    async def check_reachable(self, endpoints: list[Endpoint]) -> None:
        """Raises HostError if hosts can't reach each other, about the one that most of them miss; OSError if there is no such
        one."""
        places = [(endpoint.address, endpoint.metrics_port) for endpoint in endpoints]
        missed = await self.ask("unreachable", [places] * len(places), seconds=START_SECONDS)
        pairs = {frozenset((rank, other)) for rank, found in enumerate(missed) for other in found}
        cuts = collections.Counter(rank for pair in pairs for rank in pair)
        if cuts:
            (worst, most), *rest = cuts.most_common()
            others = sorted({rank for rank, found in enumerate(missed) if worst in found} | set(missed[worst]))
            named = ", ".join(map(str, others))
            if rest and rest[0][1] == most:
                raise OSError(f"host {worst} and host {named} can't reach each other")
            raise HostError(worst, OSError(f"it and host {named} can't reach each other"))

    async def progress(self) -> list[Progress]:
        """What the workers do. Raises HostError for the first that raises or is lost; silence alone is no loss."""

        async def one(rank: int, host: Any) -> Progress:
            loop = asyncio.get_running_loop()
            began, call = loop.time(), asyncio.ensure_future(host.progress.remote())
            try:
                while not (await asyncio.wait([call], timeout=SILENT_SECONDS))[0]:
                    liveness = self._endpoints[rank].liveness
                    reason = await self._network.why_lost(liveness, loop.time() - began)
                    if reason is not None and not call.done():
                        raise HostError(rank, TimeoutError(reason))
                found: Progress = call.result()
                return found
            except (OSError, ray.exceptions.RayError) as error:
                raise HostError(rank, error, raised=isinstance(error, ray.exceptions.RayTaskError)) from error
            finally:
                call.cancel()

        return list(await asyncio.gather(*(one(rank, host) for rank, host in enumerate(self.hosts))))

    async def ask(self, method: str, *each: Sequence[Any], seconds: float | None = None) -> list[Any]:
        """What all workers answer to a call, whose arguments are given for each of them. Raises HostError for the first that
        raises, or does not answer in time."""

        async def one(rank: int, host: Any) -> Any:
            call = getattr(host, method).remote(*(values[rank] for values in each))
            try:
                return await (call if seconds is None else answer(call, seconds, "it"))
            except (OSError, ray.exceptions.RayError) as error:
                raise HostError(rank, error, raised=isinstance(error, ray.exceptions.RayTaskError)) from error

        return list(await asyncio.gather(*(one(rank, host) for rank, host in enumerate(self.hosts))))

    async def profile(self, steps: int, seconds: float) -> AsyncGenerator[tuple[int, str, bytes], None]:
        """Traces the next `steps` steps; rank, path and content of each file, in parts. Raises RayError."""
        name = secrets.token_hex(8)
        try:
            traces = await asyncio.gather(*(host.profile.remote(name, steps, seconds) for host in self.hosts))
            for rank, (host, files) in enumerate(zip(self.hosts, traces, strict=True)):
                for path, size in sorted(files.items()):
                    for start in range(0, max(size, 1), TRACE_PART):
                        yield rank, path, await host.trace_part.remote(name, path, start, TRACE_PART)
        finally:
            for host in self.hosts:
                host.forget_trace.remote(name)

    async def renew(self) -> Placement | None:
        """Ends the workers; those that stand by come instead, on the same hosts. None if they are not all there: then the hosts
        are free, and what can stand by there still does."""
        self._kill(self.hosts)
        hosts: dict[str, Any] = {}

        async def take(endpoint: Endpoint) -> None:
            host = await self._standbys.take(endpoint.node, endpoint)
            if host is not None:
                hosts[endpoint.node] = host

        try:
            reached = await self._probe()
            there = [endpoint for endpoint, is_there in zip(self._endpoints, reached, strict=True) if is_there]
            await asyncio.gather(*map(take, there))
        except BaseException:
            self._kill(list(hosts.values()))
            self._free()
            raise
        if len(hosts) < len(self.nodes):
            for node, host in hosts.items():
                self._standbys.put(node, host)
            self._free()
            return None
        return self._with([hosts[node] for node in self.nodes])

    async def silent(self) -> list[int]:
        """The ranks of the workers that don't answer, and don't live. Of one that has died Ray says so at once; beside one of
        which nothing is heard, it has died because of that, and is not meant. What `renew` must know is begun to be found."""
        self._probe()

        async def lost(host: Any, liveness: str) -> str:
            reason = asyncio.ensure_future(self._network.why_lost(liveness, BRIEF_SECONDS, BRIEF_SECONDS))
            try:
                await answer(host.progress.remote(), BRIEF_SECONDS, "")
            except TimeoutError:
                return "" if await reason is None else "silent"
            except (OSError, ray.exceptions.RayError):
                return "dead"
            finally:
                reason.cancel()
            return ""

        liveness = [endpoint.liveness for endpoint in self._endpoints] or [""] * len(self.hosts)
        found = await asyncio.gather(*map(lost, self.hosts, liveness))
        meant = "silent" if "silent" in found else "dead"
        return [rank for rank, how in enumerate(found) if how == meant]

    def remove(self) -> None:
        """Kills all workers and frees their hosts."""
        if self._reached is not None:
            self._reached.cancel()
        self._kill(self.hosts)
        self._free()

    def _probe(self) -> asyncio.Future[list[bool]]:
        """On which hosts another worker can take the place of the one that is there, from when that was asked first."""
        if self._reached is None:
            self._reached = asyncio.gather(*map(self._replaceable, self._endpoints))
            # Whether one asks or not: a cancelled one has an exception, too.
            self._reached.add_done_callback(lambda reached: reached.cancelled() or reached.exception())
        return self._reached

    async def _replaceable(self, endpoint: Endpoint) -> bool:
        reachable, stands_by = await asyncio.gather(
            self._reachable(endpoint.liveness), self._standbys.answers(endpoint.node, REACH_SECONDS)
        )
        return reachable and stands_by

    async def _reachable(self, address: str) -> bool:
        """Whether the host at `host:port` answers within REACH_SECONDS, be it that nothing listens there."""
        if not address:  # nothing is known that speaks against it
            return True
        host, port = address.rsplit(":", 1)
        try:
            async with asyncio.timeout(REACH_SECONDS):
                _, writer = await self._network.connect(host, int(port))
        except ConnectionRefusedError:
            return True
        except (OSError, TimeoutError):
            return False
        writer.close()
        return True

    def _with(self, hosts: list[Any]) -> Placement:
        """The same hosts with the next workers."""
        return Placement(self.group, self.name, self._mesh, self.nodes, hosts, self._standbys)

    def _kill(self, hosts: list[Any]) -> None:
        for host in hosts:
            kill(host)

    def _free(self) -> None:
        remove_placement_group(self.group)


def forget_weights(directory: str) -> None:
    """Removes the weights cache of every host that is there."""
    removed = [
        _forget.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)).remote(
            directory
        )
        for node in ray.nodes()
        if node["Alive"]
    ]
    done, late = ray.wait(removed, num_returns=len(removed), timeout=FORGET_SECONDS)
    if late:
        _LOG.warning("%d of %d hosts may have kept %s", len(late), len(done) + len(late), directory)


@ray.remote(num_cpus=0, max_retries=0)
def _forget(directory: str) -> None:
    shutil.rmtree(directory, ignore_errors=True)
