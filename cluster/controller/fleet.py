"""All replicas of a service: as many as are wanted, each with a life of its own."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
from collections.abc import Callable, Sequence

from cluster.config.schema import Config
from cluster.controller.autoscaler import Autoscaler, Signals
from cluster.controller.integrity import Canary, Digests
from cluster.controller.placement import Placements, RunningMesh
from cluster.controller.quarantine import Quarantine
from cluster.controller.replica import NotReadyError, Replica
from cluster.controller.view import GatewayReport, ServiceView
from cluster.network import REAL, Network
from cluster.telemetry import metrics
from grok.serving.v1 import cluster_pb2

_LOG = logging.getLogger(__name__)

DECIDE_SECONDS = 0.5


class Fleet:
    """Starts replicas, adds some when requests wait, and takes some away, drained, when they are idle.

    A replica waits for its hosts as a pending placement group, which is what makes Ray's autoscaler add hosts.
    """

    def __init__(
        self,
        configs: Sequence[Config],
        placements: Placements,
        digests: Digests,
        reports: Callable[[], Sequence[GatewayReport]],
        network: Network = REAL,
    ) -> None:
        config = configs[0]
        self.wanted = config.replicas
        self._config = config
        self._configs = configs
        self._placements = placements
        self._reports = reports
        self._network = network
        self._version = secrets.token_hex(4), 0
        self._routes: object = None
        self._changed = asyncio.Event()
        self._autoscaler = Autoscaler(config.autoscaling, config.replicas)
        self._quarantine = Quarantine()
        self._digests, self._canary = digests, Canary()
        self._replicas: dict[int, Replica] = {}
        self._lives: dict[int, asyncio.Task[None]] = {}
        self._endings: set[asyncio.Task[None]] = set()
        self._renewal: asyncio.Task[None] | None = None
        #: Once it is known what goes on; before, a view would lack it.
        self.adopted = asyncio.Event()
        # Of replicas that are gone: the one that gets the number goes on from there.
        self._epochs: dict[int, int] = {}

    @property
    def replicas(self) -> list[Replica]:
        """All replicas, those that drain too, by their numbers."""
        return [self._replicas[index] for index in sorted(self._replicas)]

    async def run(self) -> None:
        """Keeps as many replicas alive as are wanted, those that are there already first, until cancelled; then ends them
        all."""
        loop = asyncio.get_running_loop()
        try:
            await self._adopt()
            while True:
                self._adjust()
                self._renew()
                await asyncio.sleep(DECIDE_SECONDS)
                wanted = self._autoscaler.wanted(self._signals(loop.time()))
                if wanted != self.wanted:
                    _LOG.info("replicas: %d wanted, after %d", wanted, self.wanted)
                self.wanted = wanted
        finally:
            tasks = [*self._endings, *self._lives.values(), *filter(None, [self._renewal])]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            self._placements.close()

    def view(self) -> ServiceView:
        """The service as it is now."""
        return ServiceView(tuple(replica.view for replica in self.replicas), self.wanted, self._version)

    async def news(self, version: tuple[str, int], seconds: float) -> ServiceView:
        """The view as soon as it has another version than this; after `seconds` in any case, if there is one."""
        await self.adopted.wait()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while version == self._version:
                    await self._changed.wait()
        return self.view()

    def _look(self) -> None:
        """Gives the view another version if gateways have to act on it."""
        views = [replica.view for replica in self.replicas]
        metrics.REPLICAS_READY.set(sum(view.state == cluster_pb2.REPLICA_STATE_READY for view in views))
        routes = [(view.index, view.state, view.leader, view.draining, view.returns) for view in views]
        if routes != self._routes:
            self._routes = routes
            self._version = self._version[0], self._version[1] + 1
            self._changed.set()
            self._changed = asyncio.Event()

    def _signals(self, now: float) -> Signals:
        views, reports = [replica.view for replica in self.replicas], self._reports()
        queued = sum(view.load.waiting for view in views) + sum(report.unplaced for report in reports)
        return Signals(
            now=now,
            replicas=self.wanted,
            ready=sum(view.state == cluster_pb2.REPLICA_STATE_READY for view in views),
            sessions=sum(view.load.running for view in views) + queued,
            queued=queued,
            slots=self._config.engine.slots,
            time_to_first_token=max((report.time_to_first_token for report in reports), default=0.0),
        )

    async def _adopt(self) -> None:
        """Goes on with the meshes that another controller has left."""
        running, self._epochs = await self._placements.running()
        for mesh in running:
            self._start(mesh.spec.replica, mesh)
        self.wanted = max(self.wanted, min(len(running), self._config.autoscaling.max_replicas or self.wanted))
        self.adopted.set()

    def _start(self, index: int, running: RunningMesh | None = None) -> None:
        replica = Replica(
            index,
            self._configs,
            self._placements,
            self._quarantine,
            self._digests,
            self._canary,
            lambda _: self._look(),
            self._epochs.get(index, 0),
            running,
            self._network,
            lambda: [replica.weights for replica in self.replicas],
        )
        self._replicas[index] = replica
        self._lives[index] = asyncio.ensure_future(replica.run())

    def _renew(self) -> None:
        """Gives a replica of another configuration new workers, one at a time, if all others serve."""
        outdated = [replica for replica in self.replicas if replica.outdated]
        serving = all(replica.state == cluster_pb2.REPLICA_STATE_READY for replica in self.replicas)
        if outdated and serving and (self._renewal is None or self._renewal.done()):
            self._renewal = asyncio.ensure_future(_renewed(outdated[0]))

    def _adjust(self) -> None:
        metrics.REPLICAS_WANTED.set(self.wanted)
        staying = [r for r in self.replicas if r.state != cluster_pb2.REPLICA_STATE_DRAINING]
        for _ in range(self.wanted - len(staying)):
            index = next(i for i in range(len(self._replicas) + 1) if i not in self._replicas)
            self._start(index)
        # Those that do not serve yet go first, then the youngest.
        staying.sort(key=lambda r: (r.state == cluster_pb2.REPLICA_STATE_READY, -r.index))
        for replica in staying[: max(len(staying) - self.wanted, 0)]:
            ending = asyncio.ensure_future(self._end(replica))
            self._endings.add(ending)
            ending.add_done_callback(self._endings.discard)

    async def _end(self, replica: Replica) -> None:
        """Lets a replica finish its requests, then ends it."""
        await replica.drain()
        life = self._lives.pop(replica.index)
        life.cancel()
        await asyncio.gather(life, return_exceptions=True)
        del self._replicas[replica.index]
        self._epochs[replica.index] = replica.epoch
        self._look()
        for metric in (metrics.EPOCH, metrics.REPLICA_FAILURES, metrics.MISSING_HOSTS):
            metric.remove(str(replica.index))
        _LOG.info("replica %d has ended", replica.index, extra=replica.log_fields)


async def _renewed(replica: Replica) -> None:
    try:
        await replica.restart()
    except NotReadyError as error:  # it is built again anyway, as it is configured
        _LOG.warning("%s", error, extra=replica.log_fields)
