"""`grokmesh serve`: Ray, replicas and gateway in one process, until it is stopped."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.metadata
import ipaddress
import logging
import pathlib
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator

import ray

from cluster import daemon
from cluster.capacity import with_failover, with_pages
from cluster.config.schema import Config, ConfigError, check_model
from cluster.controller.actor import RayController
from cluster.controller.placement import forget_weights
from cluster.controller.view import GatewayReport, ReplicaView, ServiceView
from cluster.gateway.admission.latency import RecentLatency
from cluster.gateway.auth.api_keys import Keys
from cluster.gateway.cluster_service import ClusterService
from cluster.gateway.controller_watch import ControllerWatch
from cluster.gateway.routing.router import Router
from cluster.gateway.server import Gateway
from cluster.gateway.validation import Limits
from cluster.local_ray import local_cluster
from cluster.telemetry import metrics
from cluster.telemetry.traces import make_tracer
from cluster.telemetry.web import WebServer
from grok.serving.v1 import cluster_pb2
from workers.checkpoint.checkpoint import open_checkpoint
from workers.checkpoint.storage import locate
from workers.messages.specs import LOADING
from workers.telemetry import garbage, logs
from workers.text.sandbox import Sandbox
from workers.text.tokenizer import Tokenizer

_LOG = logging.getLogger(__name__)

#: Seconds that Ray may take to be there, when this process starts beside it.
RAY_SECONDS = 120.0
WATCH_SECONDS = 2.0
#: Bytes of a log after which it begins anew, the last one kept beside it, and seconds between looks.
MOST_LOG_BYTES, LOG_SECONDS = 64 * 1024 * 1024, 30.0


def serve(config: Config, path: pathlib.Path, *, replace: bool = False) -> None:
    """Serves until SIGTERM or SIGINT, or until the Ray cluster is gone, then drains and cleans up.

    Args:
      config: what to serve.
      path: of the configuration, for errors.
      replace: take over from the service that runs at the address: once this one's replicas are ready, the two listen side
        by side, and the other is asked to drain.

    Raises:
      ConfigError, KeysError, CheckpointError, TokenizerError: before anything is started, if the model can't be served so.
      DaemonError: a service runs at the address already, or there is none to replace.
    """
    location = locate(config.model.checkpoint)
    checkpoint = open_checkpoint(location)
    check_model(config, checkpoint.config, path)
    config = with_failover(with_pages(config, checkpoint.config, path), checkpoint.config)
    tokenizer = Tokenizer(location / "tokenizer.model")
    if tokenizer.vocab_size > checkpoint.config.vocab_size:
        raise ConfigError(
            f"{config.model.checkpoint}: the tokenizer has {tokenizer.vocab_size} pieces, "
            f"the model embeds {checkpoint.config.vocab_size}"
        )
    keys = Keys(config.gateway.api_keys, daemon.ADMIN_KEY)
    if config.gateway.api_keys is None and not _loopback(config.gateway.address):
        _LOG.warning(
            "every client that reaches gateway.address=%s can use this service: set gateway.api_keys, or listen on 127.0.0.1",
            config.gateway.address,
        )
    model = checkpoint.config
    limits = Limits(model, config.engine.context or model.sequence_len, tokenizer.longest_piece)
    with contextlib.ExitStack() as stack:
        predecessor = daemon.replaceable(config.gateway.address) if replace else None
        if predecessor is None:
            stack.enter_context(daemon.noted(config.gateway.address))
        stack.enter_context(_ray(config))
        asyncio.run(_serve(config, limits, tokenizer, keys, predecessor))


def _loopback(address: str) -> bool:
    """Whether only this machine can reach an address."""
    host = address.rpartition(":")[0].strip("[]")
    try:
        return all(
            ipaddress.ip_address(found[4][0]).is_loopback
            for found in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
        )
    except (OSError, ValueError):
        return False


async def _serve(config: Config, limits: Limits, tokenizer: Tokenizer, keys: Keys, predecessor: int | None) -> None:
    await _Service(config, limits, tokenizer, keys, predecessor).run()  # gRPC wants to be made within the loop


class _Service:
    """The parts of a service, and the order in which they start and stop."""

    def __init__(
        self, config: Config, limits: Limits, tokenizer: Tokenizer, keys: Keys, predecessor: int | None
    ) -> None:
        version = importlib.metadata.version("grokmesh")
        model = limits.model
        sandbox = Sandbox(
            "cluster.gateway.text_job", [config.model.checkpoint, str(model.vocab_size), str(model.eos_token)]
        )
        self._config = config
        self._predecessor = predecessor
        self._tracer, self._end_traces = make_tracer(config.telemetry.traces_endpoint, config.model.name, version)
        self._readiness: asyncio.Queue[bool] = asyncio.Queue()
        assert config.gateway.failover_seconds is not None
        self._router = Router(
            config.gateway.failover_seconds,
            on_change=lambda ready: self._readiness.put_nowait(ready > 0),
            silence=config.cluster.silence_seconds,
        )
        latency = RecentLatency()
        self._controller = RayController()
        self._reporter = _Reporter()
        self._latency = latency
        self._watch = ControllerWatch(self._controller, self._report, self._follow)
        self._metrics_url = f"http://{config.telemetry.address}/metrics"
        status = ClusterService(config, version, self._controller, self._watch, self._metrics_url)
        self._gateway = Gateway(
            config,
            keys,
            limits,
            tokenizer,
            sandbox,
            self._router,
            latency,
            status,
            self._tracer,
            shares_port=predecessor is not None,
        )
        self._web = WebServer(config.telemetry.address, status.status)
        metrics.begin(version)
        metrics.QUEUED.set_function(lambda: self._router.queued)

    async def run(self) -> None:
        stop = asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, stop.set)
        if self._predecessor is None:
            self._inherit_budgets()
            await self._listen()
        await self._controller.deploy(self._config, anew=self._predecessor is not None)
        work = [
            self._watch.run(),
            self._follow_readiness(),
            _watch_ray(),
            _keep_log_small(),
        ]
        tasks = [asyncio.ensure_future(part) for part in (stop.wait(), *work)]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            _LOG.info("stopping")
            # The addresses first: a successor may wait for them.
            await self._web.stop()
            await self._gateway.stop()
            daemon.leave_budgets(self._config.gateway.address, self._gateway.admission.budgets())
            await self._leave()
        finally:
            for task in tasks:
                task.cancel()
            results = await asyncio.gather(*tasks, return_exceptions=True)
            await self._router.close()
            self._end_traces()
        for result in results:
            if isinstance(result, Exception):
                raise result

    async def _leave(self) -> None:
        """Ends the workers, unless a successor goes on with them."""
        address, cache = self._config.gateway.address, self._config.model.weights_cache
        if daemon.asked(address, daemon.LEAVE_WORKERS):
            return
        await self._controller.end()
        if daemon.asked(address, daemon.FORGET_WEIGHTS) and cache is not None:
            await asyncio.to_thread(forget_weights, cache)

    def _follow(self, view: ServiceView) -> None:
        self._router.follow(view)
        for replica in view.replicas:
            self._reporter.report(replica)

    def _report(self) -> GatewayReport:
        return GatewayReport(
            self._config.gateway.address,
            self._gateway.admission.in_flight,
            self._router.unplaced,
            self._latency.quantile(0.9),
        )

    async def _listen(self) -> None:
        await self._web.start(wait=self._predecessor is not None)
        await self._gateway.start()
        _LOG.info("%s %s, metrics at %s", daemon.LISTENING, self._config.gateway.address, self._metrics_url)

    async def _follow_readiness(self) -> None:
        while True:
            ready = await self._readiness.get()
            garbage.settle()
            if ready and self._predecessor is not None:
                await self._take_over(self._predecessor)
            await self._gateway.set_ready(ready)
            _LOG.info(daemon.SERVING if ready else "not serving: no replica is ready")

    async def _take_over(self, predecessor: int) -> None:
        """Listens beside the predecessor, asks it to end, and takes its place in the notes when it has."""
        await self._gateway.start()
        await self._gateway.set_ready(True)
        _LOG.info("ready to replace process %d, which drains now", predecessor)
        if daemon.running(self._config.gateway.address) == predecessor:
            daemon.ask(self._config.gateway.address, daemon.LEAVE_WORKERS)
            daemon.terminate(predecessor)
        try:
            await self._web.start(wait=True)
        except OSError as error:  # without it there are no metrics, but there is service
            _LOG.error("%s", error)
        self._predecessor = None
        loop = asyncio.get_running_loop()

        def inherit() -> None:
            daemon.inherit(self._config.gateway.address)
            with contextlib.suppress(RuntimeError):  # this process ends too
                loop.call_soon_threadsafe(self._inherit_budgets)

        threading.Thread(target=inherit, daemon=True).start()

    def _inherit_budgets(self) -> None:
        """Keys have spent what they spent with the service before. What they spend with one that drains counts once it ends."""
        self._gateway.admission.inherit(*daemon.left_budgets(self._config.gateway.address))


async def _keep_log_small() -> None:
    while True:
        with contextlib.suppress(
            OSError, ValueError, AttributeError
        ):  # a log that can't be kept small is no reason to stop
            await asyncio.to_thread(logs.keep_small, sys.stderr.fileno(), MOST_LOG_BYTES)
        await asyncio.sleep(LOG_SECONDS)


async def _watch_ray() -> None:
    """Ends when the Ray cluster is gone."""
    while await asyncio.to_thread(_ray_answers):
        await asyncio.sleep(WATCH_SECONDS)
    _LOG.error("the Ray cluster is gone")


def _ray_answers() -> bool:
    return bool(ray.is_initialized() and ray.nodes())


class _Reporter:
    """Logs what replicas are doing, each change once."""

    def __init__(self) -> None:
        self._said: dict[int, str] = {}

    def report(self, replica: ReplicaView) -> None:
        """Logs the replica's state, if it is news."""
        state = cluster_pb2.ReplicaState.Name(replica.state).removeprefix("REPLICA_STATE_").lower()
        if replica.state in (cluster_pb2.REPLICA_STATE_FAILED, cluster_pb2.REPLICA_STATE_GIVEN_UP):
            state = f"{state}: {replica.last_failure}"
        if replica.state == cluster_pb2.REPLICA_STATE_STARTING:
            text = ", ".join(f"host {rank} {view.progress.phase}" for rank, view in enumerate(replica.hosts))
        else:
            text = state
        line = f"replica {replica.index} epoch {replica.epoch}: {text}"
        loading = [view.progress for view in replica.hosts if view.progress.phase == LOADING]
        slowest = min(loading, key=lambda progress: progress.fraction, default=None)
        # While a checkpoint loads, each tenth of it is news.
        news = line if slowest is None else f"{line} {int(10 * slowest.fraction)}"
        if self._said.get(replica.index) != news:
            self._said[replica.index] = news
            shown = f"{line}, {slowest.loading}" if slowest is not None and slowest.bytes_total else line
            _LOG.info("%s", shown, extra=replica.log_fields)


@contextlib.contextmanager
def _ray(config: Config) -> Iterator[None]:
    """Connects to the configured Ray cluster, or runs a local one, while the block runs."""
    with contextlib.ExitStack() as stack:
        address = config.cluster.address
        if address == "local":
            hosts = config.replicas * config.mesh.hosts
            _LOG.info("starting a local Ray cluster of %d hosts", hosts)
            address = stack.enter_context(local_cluster(hosts, config.cluster.cpus_per_host))
        deadline = time.monotonic() + RAY_SECONDS
        while True:
            try:
                # Ray has workers search the current folder for modules, and what lies there is not ours.
                with contextlib.chdir("/"):
                    ray.init(
                        address=address,
                        log_to_driver=False,
                        logging_level=logging.ERROR,
                        namespace=f"grokmesh at {config.gateway.address}",
                    )
                break
            except ConnectionError as error:
                if time.monotonic() > deadline:
                    raise OSError(f"cluster.address={address}: no Ray cluster answers: {error}") from error
                time.sleep(1.0)
        stack.callback(ray.shutdown)
        yield
