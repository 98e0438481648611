"""The life of a replica: place, form the mesh, serve, and when a host is lost do all of it again in a new epoch."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import math
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from typing import Any

import ray.exceptions

from cluster.config import Config
from cluster.gateway.router import LeaderAddress, Router
from cluster.placement import Placement
from cluster.telemetry import metrics
from grok.serving.v1 import cluster_pb2
from workers.assignment import Assignment, Endpoint, Progress

_LOG = logging.getLogger(__name__)

POLL_SECONDS = 0.25
#: Seconds before a failed replica is built again: the first of a row of failures at once, later ones ever later.
BACKOFF_SECONDS = (0.0, 1.0, 2.0, 5.0, 10.0, 30.0)
#: An epoch that served so long breaks a row of failures.
HEALTHY_SECONDS = 10.0


@dataclasses.dataclass(frozen=True)
class HostView:
    """A host as the supervisor last saw it."""

    endpoint: Endpoint
    progress: Progress


class NotReadyError(RuntimeError):
    """A replica that is asked for something that only a serving one can do."""


class Replica:
    """One replica and its epochs. `state`, `epoch`, `hosts` and `last_failure` tell how it is."""

    def __init__(self, index: int, config: Config, router: Router, on_progress: Callable[[Replica], None]) -> None:
        self.index = index
        self.state: cluster_pb2.ReplicaState.ValueType = cluster_pb2.REPLICA_STATE_PLACING
        self.epoch = 0
        self.hosts: list[HostView] = []
        self.last_failure = ""
        self._placement: Placement | None = None
        self._ready_at = math.inf
        self._config = config
        self._router = router
        self._on_progress = on_progress

    def drain(self) -> None:
        """Notes that the replica only finishes what it has; it is not built again."""
        self._enter(cluster_pb2.REPLICA_STATE_DRAINING)

    async def profile(self, steps: int, seconds: float) -> list[dict[str, bytes]]:
        """The trace files of the next `steps` steps, of each host by their paths. Raises RayError, or NotReadyError."""
        placement = self._placement
        if placement is None or self.state != cluster_pb2.REPLICA_STATE_READY:
            raise NotReadyError(f"replica {self.index} does not serve")
        return list(await asyncio.gather(*(host.profile.remote(steps, seconds) for host in placement.hosts)))

    async def run(self) -> None:
        """Keeps the replica alive until cancelled, or until it is lost while it drains."""
        failures = 0
        while True:
            self._ready_at = math.inf
            try:
                await self._epoch()
                self.last_failure = "the leader ended"
            except (ray.exceptions.RayError, OSError) as error:
                self.last_failure = _summary(error)
            except Exception as error:  # whatever went wrong in this replica, the others go on
                _LOG.exception("replica %d", self.index, extra=self.log_fields)
                self.last_failure = _summary(error)
            if self.state == cluster_pb2.REPLICA_STATE_DRAINING:
                return
            healthy = asyncio.get_running_loop().time() - self._ready_at > HEALTHY_SECONDS
            self._enter(cluster_pb2.REPLICA_STATE_FAILED)
            failures = 1 if healthy else failures + 1
            _LOG.error(
                "replica %d: epoch %d ended: %s", self.index, self.epoch, self.last_failure, extra=self.log_fields
            )
            metrics.REBUILDS.labels(str(self.index)).inc()
            await asyncio.sleep(BACKOFF_SECONDS[min(failures, len(BACKOFF_SECONDS)) - 1])

    async def _epoch(self) -> None:
        """Runs one epoch to its end. Raises RayError or OSError when it fails."""
        self.epoch += 1
        metrics.EPOCH.labels(str(self.index)).set(self.epoch)
        metrics.REBUILDS.labels(str(self.index)).inc(0)
        self.hosts = []
        self._enter(cluster_pb2.REPLICA_STATE_PLACING)
        placement = await Placement.create(self._config.mesh_spec, self._config.cluster)
        self._placement = placement
        try:
            endpoints: list[Endpoint] = await asyncio.gather(*(h.endpoint.remote() for h in placement.hosts))
            self.hosts = [HostView(endpoint, Progress("starting", 0.0)) for endpoint in endpoints]
            self._enter(cluster_pb2.REPLICA_STATE_STARTING)
            assignments = self._assignments(endpoints)
            async with _background(self._watch_progress(placement)):
                await asyncio.gather(*(h.form.remote(a) for h, a in zip(placement.hosts, assignments, strict=True)))
                await asyncio.gather(*(h.warm_up.remote() for h in placement.hosts))
            await self._poll(placement)
            await self._serve(placement, assignments[0])
        finally:
            self._placement = None
            placement.remove()

    async def _serve(self, placement: Placement, leader: Assignment) -> None:
        """Serves until any host ends. The first of them decides: a mesh without one host is none."""
        loops = [asyncio.ensure_future(_result(h.serve.remote())) for h in placement.hosts]
        address = LeaderAddress(self.index, self.epoch, leader.leader, leader.secret)
        stream = asyncio.ensure_future(self._router.serve(address, self._ready))
        try:
            done, _ = await asyncio.wait([*loops, stream], return_when=asyncio.FIRST_COMPLETED)
            # Of several that end at once, the one with an error tells more.
            for task in sorted(done, key=lambda task: task.exception() is None):
                task.result()
        finally:
            for task in (*loops, stream):
                task.cancel()
            await asyncio.gather(*loops, stream, return_exceptions=True)

    def _assignments(self, endpoints: list[Endpoint]) -> list[Assignment]:
        config, first = self._config, endpoints[0]
        secret = secrets.token_bytes(32)
        return [
            Assignment(
                replica=self.index,
                epoch=self.epoch,
                secret=secret,
                rank=rank,
                coordinator=f"{first.address}:{first.coordinator_port}",
                leader=f"{first.address}:{first.leader_port}",
                model=config.model_spec,
                mesh=config.mesh_spec,
                engine=config.engine_spec,
                compilation_cache=config.cluster.compilation_cache or None,
            )
            for rank in range(len(endpoints))
        ]

    async def _watch_progress(self, placement: Placement) -> None:
        while True:
            await self._poll(placement)
            await asyncio.sleep(POLL_SECONDS)

    async def _poll(self, placement: Placement) -> None:
        progress = await asyncio.gather(*(h.progress.remote() for h in placement.hosts))
        self.hosts = [HostView(view.endpoint, p) for view, p in zip(self.hosts, progress, strict=True)]
        self._on_progress(self)

    @property
    def log_fields(self) -> dict[str, int]:
        """For a log line's `extra`."""
        return {"replica": self.index, "epoch": self.epoch}

    def _ready(self) -> None:
        self._ready_at = asyncio.get_running_loop().time()
        self._enter(cluster_pb2.REPLICA_STATE_READY)

    def _enter(self, state: cluster_pb2.ReplicaState.ValueType) -> None:
        self.state = state
        self._on_progress(self)


@contextlib.asynccontextmanager
async def _background(work: Coroutine[Any, Any, None]) -> AsyncIterator[None]:
    """Runs `work` beside the block; it ends with the block, and what it raised does not matter."""
    task = asyncio.ensure_future(work)
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def _result(ref: Awaitable[None]) -> None:
    await ref


def _summary(error: BaseException) -> str:
    """The first sentence of an error's last line, which in Ray's says what the worker raised."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (
        f"{type(error).__name__}: {lines[-1].split('. ')[0].split(' Worker exit type')[0]}"
        if lines
        else type(error).__name__
    )
