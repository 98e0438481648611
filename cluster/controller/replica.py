"""The life of a replica: place, form the mesh, serve, and when a host is lost do all of it again in a new epoch."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence

import ray.exceptions

from cluster.config.schema import Config
from cluster.controller.failures import accused, summary
from cluster.controller.integrity import Canary, Digests
from cluster.controller.placement import HostError, Placement, Placements, RunningMesh
from cluster.controller.quarantine import RAISED, Quarantine
from cluster.controller.rank_specs import rank_specs
from cluster.controller.stalls import Stalls
from cluster.controller.view import HostView, ReplicaView
from cluster.leader_stream import LeaderAddress, LeaderStream
from cluster.network import REAL, Network
from cluster.telemetry import metrics
from grok.serving.v1 import cluster_pb2
from workers.host.streams import LinkError
from workers.messages.frames import Status
from workers.messages.request import Load
from workers.messages.specs import (
    MeshSpec,
    Progress,
    RankSpec,
    WeightsAddress,
)

_LOG = logging.getLogger(__name__)

POLL_SECONDS = 0.25
#: Seconds before a failed replica is built again: the first of a row of failures at once, later ones ever later.
BACKOFF_SECONDS = (0.0, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)
#: After so many consecutive failures sessions no longer wait for the replica, and it is tried only at this interval.
GIVE_UP_FAILURES, GIVEN_UP_SECONDS = 10, 300.0
#: For each so many seconds that an epoch serves, one of a row of failures is forgotten.
HEALTHY_SECONDS = 5.0
#: Seconds that a mesh has to compute its first token, which its leader asks for at once.
PROVE_SECONDS = 60.0
#: Seconds that a leader has to say why its stream has ended.
REASON_SECONDS = 0.5
#: A replica that drains is empty when it has had no request for so long: gateways may not know at once that it drains.
EMPTY_SECONDS = 0.5
#: Seconds in which no host of a mesh that is being formed gets on until it is found out whether they reach each other.
QUIET_SECONDS = 10.0
#: Seconds that a replica which has lost a host waits for another one before it goes on with fewer.
HOSTS_SECONDS = 10.0
#: How often it looks where workers should stand by: hosts come and go.
STAND_BY_SECONDS = 5.0


class NotReadyError(RuntimeError):
    """A replica that is asked for something that only a serving one can do."""


class Replica:
    """One replica and its epochs. `view` describes it."""

    def __init__(
        self,
        index: int,
        configs: Sequence[Config],
        placements: Placements,
        quarantine: Quarantine,
        digests: Digests,
        canary: Canary,
        on_change: Callable[[Replica], None],
        epoch: int = 0,
        running: RunningMesh | None = None,
        network: Network = REAL,
        weights: Callable[[], Sequence[Sequence[WeightsAddress]]] = tuple,
    ) -> None:
        """`configs` are its own, and those of fewer hosts for when some are lost; `epoch` is the last one of the replica that
        had this number before; `running` a mesh of it that goes on; `weights` gives the `weights` of all replicas."""
        self.index = index
        self.state: cluster_pb2.ReplicaState.ValueType = cluster_pb2.REPLICA_STATE_PLACING
        self.epoch = epoch
        self.hosts: list[HostView] = []
        self.failures = 0
        self.last_failure = ""
        self._placements = placements
        self._network = network
        self._weights = weights
        self._quarantine = quarantine
        self._digests = digests
        self._canary = canary
        self._placement: Placement | None = None
        #: On which it lies or lay last, by rank.
        self._nodes: list[str] = []
        self._stream: LeaderStream | None = None
        self._draining = False
        self._spec: RankSpec | None = None if running is None else running.spec
        #: Where requests go. Those of a mesh that goes on are there already.
        self._leader: LeaderAddress | None = None if running is None else _leader(running.spec)
        self._growing = False
        self._has_served = epoch > 0
        self._running = running
        self._serving = asyncio.Event()
        self._strange = False
        #: The request that the last mesh computed alone when it ended, to find out whether that breaks it.
        self._tried = ""
        self._restart = asyncio.Event()
        self._restarting = False
        self._config = configs[0]
        self._configs = configs
        self._mesh = self._config.mesh
        self._on_change = on_change

    @property
    def view(self) -> ReplicaView:
        """The replica as it is now."""
        stream = self._stream if self._serving.is_set() else None
        gone = self.state in (cluster_pb2.REPLICA_STATE_GIVEN_UP, cluster_pb2.REPLICA_STATE_DRAINING)
        return ReplicaView(
            index=self.index,
            state=self.state,
            epoch=self.epoch,
            mesh=self._mesh,
            leader=self._leader,
            draining=self._draining,
            returns=self._has_served and not gone,
            numbers=self._config.model.numbers if self._spec is None else self._spec.model.numbers,
            hosts=tuple(self.hosts),
            failures=self.failures,
            last_failure=self.last_failure,
            load=Load() if stream is None else stream.load,
            # What gateways hear of each other's requests they hear from the leader.
            status=Status() if stream is None else dataclasses.replace(stream.status, others=()),
        )

    @property
    def weights(self) -> list[WeightsAddress]:
        """The weights caches of its hosts, in rank order; none while it does not serve."""
        found = [host.endpoint.weights for host in self.hosts if self._serving.is_set()]
        return [address for address in found if address is not None]

    async def drain(self) -> None:
        """Takes no new requests, and is not built again. Returns when it has finished what it has."""
        self._draining = True
        self._enter(cluster_pb2.REPLICA_STATE_DRAINING)
        await self._emptied()

    async def _emptied(self) -> None:
        """Returns when no gateway has had a request here for a while."""
        quiet = 0.0
        while quiet < EMPTY_SECONDS:
            await asyncio.sleep(POLL_SECONDS)
            load = self.view.load
            quiet = 0.0 if load.running or load.waiting else quiet + POLL_SECONDS

    async def profile(self, steps: int, seconds: float) -> AsyncIterator[tuple[int, str, bytes]]:
        """Traces the next `steps` steps; rank, path and content of each file, in parts. Raises RayError, or NotReadyError."""
        placement = self._placement
        if placement is None or self.state != cluster_pb2.REPLICA_STATE_READY:
            raise NotReadyError(f"replica {self.index} does not serve")
        async with contextlib.aclosing(placement.profile(steps, seconds)) as parts:
            async for part in parts:
                yield part

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
        before = self.epoch
        self._draining = True
        self._on_change(self)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._config.gateway.drain_seconds):
                await self._emptied()
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
                self.last_failure = summary(failure)
                if self.state == cluster_pb2.REPLICA_STATE_DRAINING:
                    return
                await self._fail(failure)
        finally:
            self._leave_hosts()

    async def _live(self) -> Exception | None:
        """Runs an epoch to its end; returns why it failed, None if it was asked to end."""
        self._restart.clear()
        self._strange, self._tried = False, ""
        self._serving.clear()
        try:
            running, self._running = self._running, None
            if running is None:
                await self._epoch(await self._place())
            else:
                await self._adopt(running)
        except (HostError, ray.exceptions.RayError, OSError) as error:
            return error
        except Exception as error:  # whatever went wrong in this replica, the others go on
            _LOG.exception("replica %d", self.index, extra=self.log_fields)
            return error
        finally:
            self._leader = None
        return None if self._restart.is_set() else LinkError("the leader ended")

    async def _place(self) -> Placement:
        """Workers for the next epoch: those that stood by, if their hosts are well, else new ones."""
        self.epoch += 1
        metrics.EPOCH.labels(str(self.index)).set(self.epoch)
        metrics.REBUILDS.labels(str(self.index)).inc(0)
        self._count_failures(self.failures)
        self.hosts = []
        if self.state != cluster_pb2.REPLICA_STATE_DRAINING:
            self._draining = False
            self._enter(cluster_pb2.REPLICA_STATE_PLACING)
        await self._placements.begins(self.index, self.epoch)
        if self.outdated or self._growing or await self._belongs_elsewhere():
            self._leave_hosts()
        if self._placement is not None:
            self._placement = await self._placement.renew()
        self._growing = False
        while self._placement is None:
            self._placement = await self._create()
        self._nodes = self._placement.nodes
        self._lies_on(self._config_of(len(self._nodes)).mesh)
        return self._placement

    async def _belongs_elsewhere(self) -> bool:
        """Whether one of its hosts loses workers again and again, and there are others."""
        if self._placement is None:
            return False
        failing = self._quarantine.failing(asyncio.get_running_loop().time())
        worst = frozenset([node for node in self._placement.nodes if node in failing][:1])
        return bool(worst) and await self._placements.spares_beside(self._mesh, worst)

    def _leave_hosts(self) -> None:
        if self._placement is not None:
            self._placement.remove()
            self._placement = None

    async def _create(self) -> Placement | None:
        """New workers, on as many hosts as are configured. If it has served, some may be lost for long: then on fewer."""
        patience = HOSTS_SECONDS if self._has_served and len(self._configs) > 1 else None
        for config in self._configs:
            avoided = self._quarantine.avoided(asyncio.get_running_loop().time())
            placement = await self._placements.create(self.index, config.mesh, avoided, self._nodes, patience)
            if placement is not None:
                return placement
        return None

    async def _fail(self, failure: Exception) -> None:
        """Records a failure, blames hosts, and sleeps for the backoff of so many consecutive failures. Raises nothing:
        whatever Ray answers, the replica is built again."""
        metrics.REBUILDS.labels(str(self.index)).inc()
        if self._tried:  # which is to blame, and no host
            self._enter(cluster_pb2.REPLICA_STATE_FAILED)
            text = "replica %d: epoch %d ended while it computed request %s alone: %s"
            _LOG.error(text, self.index, self.epoch, self._tried, self.last_failure, extra=self.log_fields)
            return
        self._count_failures(self.failures + 1)
        given_up = self.failures >= GIVE_UP_FAILURES
        self._enter(cluster_pb2.REPLICA_STATE_GIVEN_UP if given_up else cluster_pb2.REPLICA_STATE_FAILED)
        _LOG.error("replica %d: epoch %d ended: %s", self.index, self.epoch, self.last_failure, extra=self.log_fields)
        if self._placement is not None:
            try:
                self._placement.dump_stacks()
                await self._blame(self._placement, failure)
                if await self._belongs_elsewhere():
                    self._leave_hosts()  # another replica may do better with them meanwhile
            except Exception:
                _LOG.exception("replica %d: no host can be blamed", self.index, extra=self.log_fields)
        await asyncio.sleep(
            GIVEN_UP_SECONDS if given_up else BACKOFF_SECONDS[min(self.failures, len(BACKOFF_SECONDS)) - 1]
        )

    async def _blame(self, placement: Placement, failure: Exception) -> None:
        """Notes the hosts that are to be blamed: those whose workers do not answer; else the one that said what is wrong, or of
        which that was said; else, if it happens again and again, one after the other."""
        blamed, count = await placement.silent(), 1
        if not blamed and (host := accused(failure)) is not None:
            blamed, count = [host.rank], RAISED if host.raised else 1
        elif not blamed and self.failures > 1:
            blamed = [self.failures % len(placement.nodes)]
        now = asyncio.get_running_loop().time()
        for rank in blamed:
            self._quarantine.lost(placement.nodes[rank], now, count)
            if rank < len(self.hosts):
                metrics.HOST_LOSSES.labels(self.hosts[rank].endpoint.address).inc()

    @property
    def outdated(self) -> bool:
        """Whether what its mesh serves, and how, is not what is configured."""
        spec = self._spec
        if spec is None:
            return False
        known = [(config.model.numbers, config.mesh, config.engine) for config in self._configs]
        return (spec.model.numbers, spec.mesh, spec.engine) not in known

    async def _adopt(self, running: RunningMesh) -> None:
        """Goes on with a mesh that another controller has left, to its end."""
        self._enter(cluster_pb2.REPLICA_STATE_STARTING)
        placement = self._placement = running.placement
        self._nodes = placement.nodes
        self._lies_on(running.spec.mesh)
        self._digests.check(placement.nodes, [assignment.digests for assignment in running.assignments])
        self.hosts = [HostView(a.endpoint, Progress(a.phase, 1.0)) for a in running.assignments]
        self.epoch = running.spec.epoch
        metrics.EPOCH.labels(str(self.index)).set(self.epoch)
        await _first(self._watch_hosts(placement), placement.ask("serve"))
        await self._serve(placement, running.spec)

    async def _epoch(self, placement: Placement) -> None:
        """Runs one epoch to its end. Raises HostError, RayError or OSError when it fails."""
        endpoints = await placement.endpoints(self._config.model.weights_cache)
        self.hosts = [HostView(endpoint, Progress("starting", 0.0)) for endpoint in endpoints]
        for endpoint in endpoints:
            metrics.HOST_LOSSES.labels(endpoint.address).inc(0)
        self._enter(cluster_pb2.REPLICA_STATE_STARTING)
        if len(endpoints) > 1:
            await placement.check_reachable(endpoints)
        config = self._config_of(len(endpoints))
        specs = rank_specs(config, placement.name, self.index, self.epoch, endpoints, self._weights())
        await _first(self._watch_progress(placement), self._form(placement, specs))
        await _first(self._watch_hosts(placement), placement.ask("serve"))
        await self._serve(placement, specs[0])

    async def _serve(self, placement: Placement, spec: RankSpec) -> None:
        """Watches a mesh that serves, whose leader has this spec, until it ends."""
        self._spec = spec
        stream = self._stream = await LeaderStream.connect(_leader(spec), spec.silence_seconds, self._network)
        try:
            # The first that ends decides: a mesh without one host is none.
            await _first(
                self._watch_hosts(placement),
                stream.run(lambda _: None, self._accept),
                self._stand_by(placement),
                self._prove(),
                self._grow(placement),
                self._restart.wait(),
            )
        finally:
            stream.close()
            self._tried = stream.trying
            self._serving.clear()
            self._stream = self._leader = None
            self._on_change(self)
        if self._strange:
            raise OSError(
                "the mesh computes other probabilities than the first one did: look at what its hosts have loaded; if "
                "the first was wrong, start the service anew"
            )
        if not self._restart.is_set():
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(REASON_SECONDS):
                    await self._watch_hosts(placement, 0.05)

    async def _prove(self) -> None:
        """Raises TimeoutError if the mesh does not compute a token in time."""
        try:
            async with asyncio.timeout(PROVE_SECONDS):
                await self._serving.wait()
        except TimeoutError as error:
            raise TimeoutError(f"the mesh has not computed a token in {PROVE_SECONDS:g} s") from error
        await asyncio.Event().wait()

    async def _grow(self, placement: Placement) -> None:
        """Ends a mesh of fewer hosts than are configured once there are enough, after it has drained."""
        if self._mesh.hosts < self._config.mesh.hosts:
            await self._serving.wait()
            await self._placements.room(self.index, self._config.mesh, placement.nodes)
            self._growing = True
            with contextlib.suppress(NotReadyError):  # it ends by itself
                await self.restart()
        await asyncio.Event().wait()

    async def _watch_hosts(self, placement: Placement, pause: float = POLL_SECONDS) -> None:
        """Asks again and again what the hosts do. Raises HostError for one that is lost, or whose part has failed."""
        while True:
            await self._poll(placement)
            await asyncio.sleep(pause)

    async def _form(self, placement: Placement, specs: list[RankSpec]) -> None:
        loaded = await placement.ask("form", specs)
        difference = self._digests.check(placement.nodes, loaded)
        if difference is not None:
            problem = f"it has loaded other bytes of {difference.part} than {difference.others}"
            raise HostError(difference.rank, OSError(f"{problem}; look at its copy of the checkpoint"), raised=True)
        _LOG.info("%d of %d parts of the weights were compared", *self._digests.checked(loaded), extra=self.log_fields)
        await placement.ask("warm_up")

    async def _stand_by(self, placement: Placement) -> None:
        """Has workers stand by for the next epoch, once this one serves."""
        await self._serving.wait()
        while True:
            try:
                await self._placements.stand_by(placement, self._config)
            except (OSError, ray.exceptions.RayError) as error:
                _LOG.warning("no workers stand by: %s", summary(error), extra=self.log_fields)
            await asyncio.sleep(STAND_BY_SECONDS)

    def _lies_on(self, mesh: MeshSpec) -> None:
        self._mesh = mesh
        metrics.MISSING_HOSTS.labels(str(self.index)).set(self._config.mesh.hosts - mesh.hosts)

    def _config_of(self, hosts: int) -> Config:
        """The one for so many hosts."""
        return next((config for config in self._configs if config.mesh.hosts == hosts), self._config)

    async def _watch_progress(self, placement: Placement) -> None:
        """Asks again and again what the hosts do. Raises HostError for one that does not answer, or does not get on, and when
        none gets on for one that others can't reach: else they may wait for each other for long."""
        stalls, loop = Stalls(), asyncio.get_running_loop()
        looked = loop.time()
        while True:
            await self._poll(placement)
            now = loop.time()
            stalls.note([view.progress for view in self.hosts], now)
            if len(self.hosts) > 1 and min(stalls.quiet(now), now - looked) > QUIET_SECONDS:
                await placement.check_reachable([view.endpoint for view in self.hosts])
                looked = loop.time()
            await asyncio.sleep(POLL_SECONDS)

    async def _poll(self, placement: Placement) -> None:
        """Asks all hosts what they do. Raises HostError for one that is lost."""
        progress = await placement.progress()
        self.hosts = [HostView(view.endpoint, p) for view, p in zip(self.hosts, progress, strict=True)]
        self._on_change(self)

    @property
    def log_fields(self) -> dict[str, int]:
        """For a log line's `extra`."""
        return {"replica": self.index, "epoch": self.epoch}

    def _accept(self) -> None:
        """The mesh has computed a token: it serves, if that is what other meshes computed."""
        assert self._placement is not None
        assert self._stream is not None
        self._strange = not self._canary.accept(self._stream.canary, self._placement.nodes)
        if self._strange:
            self._stream.abort()
            return
        self._serving.set()
        self._leader = self._stream.leader
        self._has_served = True
        if self.state == cluster_pb2.REPLICA_STATE_DRAINING:
            return
        self._enter(cluster_pb2.REPLICA_STATE_READY)
        asyncio.get_running_loop().call_later(HEALTHY_SECONDS, self._recover, self.epoch)

    def _recover(self, epoch: int) -> None:
        """Forgets failures while an epoch serves."""
        if self.failures and (self.epoch, self.state) == (epoch, cluster_pb2.REPLICA_STATE_READY):
            self._count_failures(self.failures - 1)
            asyncio.get_running_loop().call_later(HEALTHY_SECONDS, self._recover, epoch)

    def _count_failures(self, failures: int) -> None:
        self.failures = failures
        metrics.REPLICA_FAILURES.labels(str(self.index)).set(failures)

    def _enter(self, state: cluster_pb2.ReplicaState.ValueType) -> None:
        self.state = state
        self._on_change(self)


def _leader(spec: RankSpec) -> LeaderAddress:
    """Of the mesh whose leader has this spec."""
    return LeaderAddress(spec.replica, spec.epoch, spec.leader, spec.secret, spec.liveness)


async def _first(*parts: Awaitable[object]) -> None:
    """Returns or raises as the first that ends does; the others are cancelled. Of several that end at once, the one with an
    error says more."""
    tasks = [asyncio.ensure_future(part) for part in parts]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        done = [task for task in tasks if task.done()]
        for task in sorted(done, key=lambda task: task.exception() is None):
            task.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
