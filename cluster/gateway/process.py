"""The parts of one gateway, and the order in which they start and stop."""

from __future__ import annotations

import asyncio
import importlib.metadata
import logging
import os

from cluster.config.schema import Config, ConfigError
from cluster.controller.controller import ControllerClient
from cluster.controller.view import GatewayReport, ServiceView
from cluster.deployment import Deployment
from cluster.gateway.admission.latency import RecentLatency
from cluster.gateway.auth.api_keys import Keys
from cluster.gateway.cluster_service import ClusterService
from cluster.gateway.controller_watch import KEYS_SECONDS, SYNC_SECONDS, ControllerWatch
from cluster.gateway.openai.chat_template import ChatTemplate, read_template
from cluster.gateway.routing.router import Router
from cluster.gateway.server import Gateway
from cluster.gateway.validation import Limits
from cluster.telemetry import metrics
from cluster.telemetry.log_files import keep_log_small
from cluster.telemetry.traces import make_tracer
from cluster.telemetry.web import WebServer
from workers.checkpoint.checkpoint import open_checkpoint
from workers.checkpoint.storage import locate
from workers.host.actor import METRICS_PORTS
from workers.telemetry import garbage, logs
from workers.telemetry.metrics_server import serve_metrics
from workers.text.sandbox import Sandbox
from workers.text.tokenizer import Tokenizer

_LOG = logging.getLogger(__name__)


def read_model(config: Config) -> tuple[Tokenizer, Limits, ChatTemplate | None]:
    """What a gateway must know of a model. Raises CheckpointError, TokenizerError, TemplateError, ConfigError."""
    location = locate(config.model.checkpoint)
    model = open_checkpoint(location).config
    tokenizer = Tokenizer(location / "tokenizer.model")
    if tokenizer.vocab_size > model.vocab_size:
        raise ConfigError(
            f"{config.model.checkpoint}: the tokenizer has {tokenizer.vocab_size} pieces, "
            f"the model embeds {model.vocab_size}"
        )
    context = config.engine.context or model.sequence_len
    limits = Limits(model, context, tokenizer.longest_piece, config.gateway.share_prefixes)
    return tokenizer, limits, read_template(location, tokenizer.piece(model.eos_token))


class GatewayProcess:
    """One gateway. Must be made in the event loop that runs it, as gRPC wants it."""

    def __init__(
        self, deployment: Deployment, name: str, index: int, address: str, controller: ControllerClient
    ) -> None:
        """`index` is its number on its host, at `address`: the first one has the host's telemetry address."""
        config = deployment.config
        tokenizer, limits, template = read_model(config)
        version = importlib.metadata.version("grokmesh")
        model = limits.model
        sandbox = Sandbox(
            "cluster.gateway.text_job", [config.model.checkpoint, str(model.vocab_size), str(model.eos_token)]
        )
        self._name = name
        self._beside = deployment.beside
        self._listening = False
        self._stopping = asyncio.Event()
        self._tracer, self._end_traces = make_tracer(config.telemetry.traces_endpoint, config.model.name, version)
        self._readiness: asyncio.Queue[bool] = asyncio.Queue()
        assert config.gateway.failover_seconds is not None
        self._router = Router(
            config.gateway.failover_seconds,
            on_change=lambda ready: self._readiness.put_nowait(ready > 0),
            silence=config.cluster.silence_seconds,
            numbers=config.model.numbers,
        )
        self._latency = RecentLatency()
        self._watch = ControllerWatch(
            controller, self._report, self._follow, KEYS_SECONDS if config.gateway.api_keys else SYNC_SECONDS
        )
        self._address = address
        metrics_url = f"http://{config.telemetry.address}/metrics"
        status = ClusterService(config, version, controller, self._watch, metrics_url)
        keys = Keys(config.gateway.api_keys, deployment.admin_key)
        self._gateway = Gateway(
            config,
            keys,
            limits,
            tokenizer,
            template,
            sandbox,
            self._router,
            self._latency,
            status,
            self._tracer,
        )
        self._web = (
            WebServer(config.telemetry.address, status.status, lambda: self._router.ready) if index == 0 else None
        )
        self._metrics_url = metrics_url
        if self._web is None:
            server = serve_metrics(address, (*METRICS_PORTS, 0), metrics.REGISTRY)
            self._metrics_url = f"http://{address}:{server.server_port}/metrics"
        metrics.begin(version)
        metrics.QUEUED.set_function(lambda: self._router.queued)

    async def run(self) -> None:
        """Serves until `stop`, then drains. Raises OSError if an address can't be had."""
        if not self._beside:
            await self._listen()
        work = [self._watch.run(), self._follow_readiness(), self._serve_web(), keep_log_small()]
        tasks = [asyncio.ensure_future(part) for part in (self._stopping.wait(), *work)]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            # The addresses first: a successor may wait for them.
            if self._web is not None:
                await self._web.stop()
            await self._gateway.stop()
            await self._watch.refresh()  # what the last requests have cost
        finally:
            for task in tasks:
                task.cancel()
            results = await asyncio.gather(*tasks, return_exceptions=True)
            await self._router.close()
            self._end_traces()
        for result in results:
            if isinstance(result, Exception):
                raise result

    def stop(self) -> None:
        """Has `run` drain and return."""
        self._stopping.set()

    async def _listen(self) -> None:
        await self._gateway.start()
        self._listening = True

    async def _serve_web(self) -> None:
        if self._web is not None:
            try:
                await self._web.start(wait=True)
            except OSError as error:  # without it there are no metrics, but there is service
                _LOG.error("%s", error)
        await asyncio.Event().wait()

    def _follow(self, view: ServiceView, report: GatewayReport) -> None:
        self._router.follow(view)
        self._gateway.admission.learn(report.keys, view.keys)

    def _report(self) -> GatewayReport:
        return GatewayReport(
            name=self._name,
            address=self._address,
            pid=os.getpid(),
            metrics_url=self._metrics_url,
            log=logs.path(),
            listening=self._listening,
            replicas=self._router.ready,
            requests=self._gateway.admission.in_flight,
            unplaced=self._router.unplaced,
            time_to_first_token=self._latency.quantile(0.9),
            keys=self._gateway.admission.uses(),
        )

    async def _follow_readiness(self) -> None:
        while True:
            ready = await self._readiness.get()
            garbage.settle()
            if ready and not self._listening:
                await self._listen()
            await self._gateway.set_ready(ready)
