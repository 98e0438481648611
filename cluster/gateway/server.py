"""Puts the gateway's services on its ports."""

from __future__ import annotations

import asyncio
import importlib.metadata
import logging
from typing import TYPE_CHECKING

import grpc.aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from opentelemetry import trace

from cluster.config.schema import Config
from cluster.gateway.admission.admission import Admission
from cluster.gateway.admission.latency import RecentLatency
from cluster.gateway.auth.api_keys import Keys
from cluster.gateway.auth.tls import server_credentials
from cluster.gateway.interceptor import CallInterceptor
from cluster.gateway.routing.router import Router
from cluster.gateway.service import GenerationService
from cluster.gateway.texts import Texts
from cluster.gateway.validation import Limits
from cluster.telemetry import metrics
from grok.serving.v1 import cluster_pb2, cluster_pb2_grpc, generation_pb2, generation_pb2_grpc
from workers.model.parameters import parameter_table
from workers.telemetry.stalls import StallWatch
from workers.text.sandbox import Sandbox
from workers.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from cluster.gateway.openai.chat_template import ChatTemplate
    from cluster.gateway.openai.server import HttpServer

_LOG = logging.getLogger(__name__)

GENERATION = generation_pb2.DESCRIPTOR.services_by_name["GenerationService"].full_name
CLUSTER = cluster_pb2.DESCRIPTOR.services_by_name["ClusterService"].full_name

#: Seconds for completions that were asked to go on elsewhere, and for other calls, to end.
END_SECONDS, IDLE_GRACE_SECONDS = 10.0, 1.0
#: In which completions that the server had accepted before it stopped are still admitted.
ACCEPTED_SECONDS = 0.25
_POLL_SECONDS = 0.05
#: Seconds between measurements of the loop's lag.
BEAT_SECONDS = 0.05
#: Calls at a time beside completions: status, health, what is turned away.
EXTRA_CALLS = 1024
#: How many times as many bytes as a message of gRPC may have, one of HTTP may: characters may be written as \uXXXX.
JSON_BYTES = 2
#: Of gRPC: how much a connection may hold, and when one that is dead or of no use ends.
OPTIONS = (
    ("grpc.max_concurrent_streams", 1024),
    ("grpc.max_metadata_size", 16 * 1024),
    # What a stream may send before its message is asked for does not grow.
    ("grpc.http2.bdp_probe", 0),
    # A client's machine may vanish without a word: its requests end within half a minute.
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.max_connection_idle_ms", 10 * 60_000),
    # Clients may ask as often whether this end lives, also while nothing is under way.
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 500),
    ("grpc.http2.max_ping_strikes", 0),
)


class Gateway:
    """A gRPC server with generation, cluster status, health and reflection. Health follows the router's replicas."""

    def __init__(
        self,
        config: Config,
        keys: Keys,
        limits: Limits,
        tokenizer: Tokenizer,
        template: ChatTemplate | None,
        sandbox: Sandbox,
        router: Router,
        latency: RecentLatency,
        cluster: cluster_pb2_grpc.ClusterServiceServicer,
        tracer: trace.Tracer,
    ) -> None:
        self._config = config.gateway
        self._lag: asyncio.Task[None] | None = None
        self._stall_seconds = config.telemetry.stall_seconds
        self._router = router
        self._health = health.aio.HealthServicer()
        self.admission = Admission(config.gateway.max_requests, config.gateway.queue_seconds)
        self._texts = Texts(tokenizer, sandbox, self.admission.used)
        self._server = grpc.aio.server(
            interceptors=[CallInterceptor(keys, tracer, limits.message_bytes)],
            maximum_concurrent_rpcs=config.gateway.max_requests + EXTRA_CALLS,
            # Gateways of a host share the address.
            options=[
                *OPTIONS,
                ("grpc.max_receive_message_length", config.gateway.max_message_bytes),
                ("grpc.so_reuseport", 1),
            ],
        )
        model = describe(config.model.name, limits)
        service = GenerationService(
            limits,
            self._texts,
            router,
            self.admission,
            latency,
            model,
            tracer,
            config.telemetry.log_prompts,
        )
        generation_pb2_grpc.add_GenerationServiceServicer_to_server(service, self._server)
        cluster_pb2_grpc.add_ClusterServiceServicer_to_server(cluster, self._server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        reflection.enable_server_reflection(
            (GENERATION, CLUSTER, health.SERVICE_NAME, reflection.SERVICE_NAME), self._server
        )
        self._http: HttpServer | None = None
        if config.gateway.http_address is not None:
            # FastAPI takes as long to import as all else.
            from cluster.gateway.openai.app import Served, make_app
            from cluster.gateway.openai.door import Door
            from cluster.gateway.openai.server import HttpServer

            version = importlib.metadata.version("grokmesh")
            app = make_app(Served(service, tokenizer, template, model, version, lambda: router.ready > 0))
            most_bytes = min(config.gateway.max_message_bytes, JSON_BYTES * limits.message_bytes)
            self._http = HttpServer(config.gateway, Door(app, keys, tracer, most_bytes))

    async def start(self) -> None:
        """Listens. Not serving until `set_ready`. Raises OSError if the address can't be had, TlsError."""
        try:
            if self._config.tls_certificate is None:
                self._server.add_insecure_port(self._config.address)
            else:
                self._server.add_secure_port(self._config.address, server_credentials(self._config))
        except RuntimeError as error:
            raise OSError(f"gateway.address={self._config.address} can't be listened on") from error
        await self.set_ready(False)
        await self._server.start()
        if self._http is not None:
            await self._http.start()
        self._lag = asyncio.ensure_future(_measure_lag(self._stall_seconds))

    async def set_ready(self, ready: bool) -> None:
        """Sets the health status: whether any replica serves."""
        status = health_pb2.HealthCheckResponse.SERVING if ready else health_pb2.HealthCheckResponse.NOT_SERVING
        for service in ("", GENERATION):
            await self._health.set(service, status)

    async def stop(self) -> None:
        """Drains: health says NOT_SERVING, no more completions are accepted, those in flight have `drain_seconds`, and then are
        asked to go on elsewhere.

        Clients are asked to connect anew; gRPC sends again what they meanwhile send on old connections.
        """
        await self._health.enter_graceful_shutdown()
        drain = self._config.drain_seconds
        stopping = asyncio.ensure_future(self._server.stop(drain + END_SECONDS + IDLE_GRACE_SECONDS))
        if self._http is not None:
            self._http.close()
        await asyncio.sleep(ACCEPTED_SECONDS)
        self.admission.draining = True
        await self._emptied(drain)
        self._router.end("the gateway is shutting down")
        await self._emptied(END_SECONDS)
        await asyncio.wait([stopping], timeout=IDLE_GRACE_SECONDS)
        await self._server.stop(0)
        await stopping
        if self._http is not None:
            await self._http.stop()
        self._texts.close()
        if self._lag is not None:
            self._lag.cancel()

    async def _emptied(self, seconds: float) -> None:
        """Waits until no completion is in the gateway, at most so long."""
        deadline = asyncio.get_running_loop().time() + seconds
        while self.admission.in_flight and asyncio.get_running_loop().time() < deadline:
            await asyncio.sleep(_POLL_SECONDS)


async def _measure_lag(stall_seconds: float | None) -> None:
    """Measures how late this loop comes to what is due; whatever makes it late by more than `stall_seconds` is logged."""
    loop = asyncio.get_running_loop()
    pause = BEAT_SECONDS if stall_seconds is None else stall_seconds / 2
    # A turn, as the watch knows it, goes from one beat to the next.
    watch = StallWatch("the gateway's loop", None if stall_seconds is None else stall_seconds + pause, _LOG.warning)
    while True:
        watch.turn()
        due = loop.time() + pause
        await asyncio.sleep(pause)
        metrics.LOOP_LAG.observe(max(loop.time() - due, 0.0))


def describe(name: str, limits: Limits) -> generation_pb2.GetModelResponse:
    """The served model, for clients."""
    model = limits.model
    return generation_pb2.GetModelResponse(
        name=name,
        context_length=limits.context,
        vocab_size=model.vocab_size,
        eos_token=model.eos_token,
        parameters=sum(info.size for info in parameter_table(model)),
        emb_size=model.emb_size,
        num_layers=model.num_layers,
        num_experts=model.num_experts,
        num_selected_experts=model.num_selected_experts,
    )
