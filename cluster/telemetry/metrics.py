"""What the gateway tells Prometheus. Names that begin with gen_ai follow OpenTelemetry's conventions for generative AI."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, disable_created_metrics

#: All metrics of this process, without those of other kinds of process that share its code.
REGISTRY = CollectorRegistry()
ProcessCollector(registry=REGISTRY)
disable_created_metrics()

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)

TIME_TO_FIRST_TOKEN = Histogram(
    "gen_ai_server_time_to_first_token_seconds",
    "From a request's arrival to its first token.",
    buckets=_SECONDS,
    registry=REGISTRY,
)
TIME_PER_OUTPUT_TOKEN = Histogram(
    "gen_ai_server_time_per_output_token_seconds",
    "Mean time between a request's tokens after the first, told once a request.",
    buckets=(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0),
    registry=REGISTRY,
)
REQUEST_DURATION = Histogram(
    "gen_ai_server_request_duration_seconds",
    "From a request's arrival to its end.",
    buckets=_SECONDS,
    registry=REGISTRY,
)
REQUESTS = Counter("grokmesh_gateway_requests", "Calls that ended.", ["method", "code"], registry=REGISTRY)
REJECTIONS = Counter(
    "grokmesh_gateway_rejections", "Completions that were not admitted.", ["reason"], registry=REGISTRY
)
PROMPT_TOKENS = Counter("grokmesh_gateway_prompt_tokens", "Prompt tokens of admitted completions.", registry=REGISTRY)
COMPLETION_TOKENS = Counter("grokmesh_gateway_completion_tokens", "Tokens received for completions.", registry=REGISTRY)
IN_FLIGHT = Gauge("grokmesh_gateway_requests_in_flight", "Completions in the gateway.", registry=REGISTRY)
QUEUED = Gauge(
    "grokmesh_gateway_queued_requests", "Completions in the gateway that have no token yet.", registry=REGISTRY
)
REPLICAS_READY = Gauge("grokmesh_replicas_ready", "Replicas that serve.", registry=REGISTRY)
EPOCH = Gauge("grokmesh_replica_epoch", "Epoch of a replica's mesh.", ["replica"], registry=REGISTRY)
REBUILDS = Counter(
    "grokmesh_replica_rebuilds", "Meshes that were formed again after a failure.", ["replica"], registry=REGISTRY
)
