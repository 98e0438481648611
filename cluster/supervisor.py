"""The life of a replica: place, form the mesh, serve, and when a host is lost do all of it again in a new epoch."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import secrets
from collections.abc import Awaitable, Callable

import ray.exceptions

from cluster.config import Config
from cluster.gateway.router import LeaderAddress, Router
from cluster.placement import SILENT_SECONDS, Placement, answer, spares_beside
from cluster.suspects import Suspects
from cluster.telemetry import metrics
from grok.serving.v1 import cluster_pb2
from workers.assignment import Assignment, Endpoint, Progress

_LOG = logging.getLogger(__name__)

POLL_SECONDS = 0.25
#: Seconds before a failed replica is built again: the first of a row of failures at once, later ones ever later.
BACKOFF_SECONDS = (0.0, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)
#: After so many failures in a row nobody waits for the replica any more, and it is tried only so often.
GIVE_UP_FAILURES, GIVEN_UP_SECONDS = 10, 300.0
#: An epoch that served so long breaks a row of failures. It need not be long: a request that breaks whoever computes it is
#: found by the router, and a host that breaks whatever runs there is avoided.
HEALTHY_SECONDS = 2.0


@dataclasses.dataclass(frozen=True)
class HostView:
    """A host as the supervisor last saw it."""

    endpoint: Endpoint
    progress: Progress


class NotReadyError(RuntimeError):
    """A replica that is asked for something that only a serving one can do."""


class Replica:
    """One replica and its epochs. `state`, `epoch`, `hosts`, `failures` (in a row) and `last_failure` tell how it is."""

    def __init__(
        self,
        index: int,
        config: Config,
        router: Router,
        suspects: Suspects,
        on_progress: Callable[[Replica], None],
    ) -> None:
        self.index = index
        self.state: cluster_pb2.ReplicaState.ValueType = cluster_pb2.REPLICA_STATE_PLACING
        self.epoch = 0
        self.hosts: list[HostView] = []
        self.failures = 0
        self.last_failure = ""
        self._suspects = suspects
        self._placement: Placement | None = None
        self._serving = asyncio.Event()
        self._restart = asyncio.Event()
        self._restarting = False
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

    async def restart(self) -> int:
        """Ends the epoch, once its sessions have ended or their time to drain is over; the next one's number, when it serves.

        Raises:
          NotReadyError: the replica does not serve, or fails meanwhile.
        """
        if self.state != cluster_pb2.REPLICA_STATE_READY or self._restarting:
            raise NotReadyError(f"replica {self.index} does not serve")
        self._restarting = True
        try:
            return await self._replace()
        finally:
            self._restarting = False

    async def _replace(self) -> int:
        before, loop = self.epoch, asyncio.get_running_loop()
        self._router.drain(self.index, returns=True)
        deadline = loop.time() + self._config.gateway.drain_seconds
        while self._router.busy(self.index) and loop.time() < deadline:
            await asyncio.sleep(POLL_SECONDS)
        if (self.epoch, self.state) == (before, cluster_pb2.REPLICA_STATE_READY):
            self._restart.set()
            while self.epoch <= before + 1 and self.state != cluster_pb2.REPLICA_STATE_DRAINING:
                if self.epoch > before and self.state == cluster_pb2.REPLICA_STATE_READY:
                    return self.epoch
                await asyncio.sleep(POLL_SECONDS)
        raise NotReadyError(f"replica {self.index} failed, or was to end, meanwhile: {self.last_failure}")

    async def run(self) -> None:
        """Keeps the replica alive until cancelled, or until it is lost while it drains."""
        try:
            while True:
                failure = await self._live()
                if failure is None:
                    continue
                self.last_failure = failure
                if self.state == cluster_pb2.REPLICA_STATE_DRAINING:
                    return
                await self._fail()
        finally:
            if self._placement is not None:
                self._placement.remove()

    async def _live(self) -> str | None:
        """Runs an epoch to its end; returns why it failed, None if it was told to end."""
        self._restart.clear()
        self._serving = asyncio.Event()
        try:
            await self._epoch(await self._place())
        except (ray.exceptions.RayError, OSError) as error:
            return _summary(error)
        except Exception as error:  # whatever went wrong in this replica, the others go on
            _LOG.exception("replica %d", self.index, extra=self.log_fields)
            return _summary(error)
        return None if self._restart.is_set() else "the leader ended"

    async def _place(self) -> Placement:
        """Workers for the next epoch: those that stood by, if their hosts are well, else new ones."""
        self.epoch += 1
        metrics.EPOCH.labels(str(self.index)).set(self.epoch)
        metrics.REBUILDS.labels(str(self.index)).inc(0)
        self._count_failures(self.failures)
        nodes = {view.endpoint.node for view in self.hosts}
        self.hosts = []
        self._enter(cluster_pb2.REPLICA_STATE_PLACING)
        now = asyncio.get_running_loop().time()
        config, failing = self._config, self._suspects.failing(now)
        if self._placement is not None:
            if not nodes.isdisjoint(failing) and await asyncio.to_thread(
                spares_beside, config.mesh_spec, config.cluster, failing
            ):
                self._placement.remove()
                self._placement = None
            else:
                self._placement = await self._placement.renew()
        if self._placement is None:
            self._placement = await Placement.create(config.mesh_spec, config.cluster, self._suspects.avoided(now))
        return self._placement

    async def _fail(self) -> None:
        """Notes a failure and whose it was, and waits as long as its being one of a row demands."""
        self._count_failures(self.failures + 1)
        given_up = self.failures >= GIVE_UP_FAILURES
        self._enter(cluster_pb2.REPLICA_STATE_GIVEN_UP if given_up else cluster_pb2.REPLICA_STATE_FAILED)
        _LOG.error("replica %d: epoch %d ended: %s", self.index, self.epoch, self.last_failure, extra=self.log_fields)
        metrics.REBUILDS.labels(str(self.index)).inc()
        if self._placement is not None:
            await self._blame(self._placement)
        if given_up:
            self._router.forget(self.index)
        await asyncio.sleep(
            GIVEN_UP_SECONDS if given_up else BACKOFF_SECONDS[min(self.failures, len(BACKOFF_SECONDS)) - 1]
        )

    async def _blame(self, placement: Placement) -> None:
        """Notes the hosts whose workers do not answer."""
        silent, now = await placement.silent(), asyncio.get_running_loop().time()
        if silent and not self.hosts:  # they never said who they are
            nodes = await asyncio.to_thread(placement.nodes)
            for rank in silent:
                self._suspects.lost(nodes[rank], now)
            return
        for endpoint in [self.hosts[rank].endpoint for rank in silent]:
            self._suspects.lost(endpoint.node, now)
            metrics.HOST_LOSSES.labels(endpoint.address).inc()

    async def _epoch(self, placement: Placement) -> None:
        """Runs one epoch to its end. Raises RayError or OSError when it fails."""
        endpoints = await placement.endpoints()
        self.hosts = [HostView(endpoint, Progress("starting", 0.0)) for endpoint in endpoints]
        for endpoint in endpoints:
            metrics.HOST_LOSSES.labels(endpoint.address).inc(0)
        self._enter(cluster_pb2.REPLICA_STATE_STARTING)
        assignments = self._assignments(endpoints)
        await _first(self._watch_progress(placement), self._form(placement, assignments))
        await self._poll(placement)
        leader = LeaderAddress(self.index, self.epoch, assignments[0].leader, assignments[0].secret)
        # The first that ends decides: a mesh without one host is none.
        await _first(
            *(host.serve.remote() for host in placement.hosts),
            self._router.serve(leader, self._ready),
            self._stand_by(placement),
            self._restart.wait(),
        )

    async def _form(self, placement: Placement, assignments: list[Assignment]) -> None:
        await asyncio.gather(*(h.form.remote(a) for h, a in zip(placement.hosts, assignments, strict=True)))
        await asyncio.gather(*(h.warm_up.remote() for h in placement.hosts))

    async def _stand_by(self, placement: Placement) -> None:
        """Has workers stand by for the next epoch, once this one serves."""
        await self._serving.wait()
        try:
            await placement.stand_by(self._config.model_spec, self._config.engine_spec)
        except ray.exceptions.RayError as error:
            _LOG.warning("nobody stands by: %s", _summary(error), extra=self.log_fields)
        await asyncio.Event().wait()

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
        """Asks all hosts what they do. Raises TimeoutError, naming one that does not answer."""
        progress = await asyncio.gather(
            *(answer(h.progress.remote(), SILENT_SECONDS, f"host {rank}") for rank, h in enumerate(placement.hosts))
        )
        self.hosts = [HostView(view.endpoint, p) for view, p in zip(self.hosts, progress, strict=True)]
        self._on_progress(self)

    @property
    def log_fields(self) -> dict[str, int]:
        """For a log line's `extra`."""
        return {"replica": self.index, "epoch": self.epoch}

    def _ready(self) -> None:
        self._serving.set()
        self._enter(cluster_pb2.REPLICA_STATE_READY)
        asyncio.get_running_loop().call_later(HEALTHY_SECONDS, self._recover, self.epoch)

    def _recover(self, epoch: int) -> None:
        """Forgets failures when an epoch has served long enough."""
        if (self.epoch, self.state) == (epoch, cluster_pb2.REPLICA_STATE_READY):
            self._count_failures(0)

    def _count_failures(self, failures: int) -> None:
        self.failures = failures
        metrics.FAILURES.labels(str(self.index)).set(failures)

    def _enter(self, state: cluster_pb2.ReplicaState.ValueType) -> None:
        self.state = state
        self._on_progress(self)


async def _first(*parts: Awaitable[object]) -> None:
    """Returns or raises as the first that ends does; the others are cancelled. Of several that end at once, the one with an
    error tells more."""
    tasks = [asyncio.ensure_future(part) for part in parts]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in sorted(done, key=lambda task: task.exception() is None):
            task.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _summary(error: BaseException) -> str:
    """The first sentence of an error's last line, which in Ray's says what the worker raised."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (
        f"{type(error).__name__}: {lines[-1].split('. ')[0].split(' Worker exit type')[0]}"
        if lines
        else type(error).__name__
    )
