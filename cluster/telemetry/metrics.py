"""The gateway's metrics. Names that begin with gen_ai follow OpenTelemetry's conventions for generative AI."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, disable_created_metrics

#: All metrics of this process, without those of other kinds of process that share its code.
#: What a gateway exports, and what the controller does.
REGISTRY, CONTROLLER = CollectorRegistry(), CollectorRegistry()
ProcessCollector(registry=REGISTRY)
ProcessCollector(registry=CONTROLLER)
disable_created_metrics()

#: Calls that complete prompts.
COMPLETING = ("Generate", "GenerateOnce", "Score", "ScoreStream", "Completions", "ChatCompletions")
#: Codes that a completion can end with, besides the client's own faults.
SERVER_CODES = ("OK", "UNAVAILABLE", "INTERNAL", "RESOURCE_EXHAUSTED", "DEADLINE_EXCEEDED", "CANCELLED")
#: Of these, those that are failures of the service.
FAILURE_CODES = ("UNAVAILABLE", "INTERNAL", "RESOURCE_EXHAUSTED", "DEADLINE_EXCEEDED")
REJECTION_REASONS = (
    "draining", "full", "queue", "engine_full", "no_replica", "unauthenticated", "scope", "key_requests", "key_tokens",
)  # fmt: skip

_GEN_AI = ("gen_ai_operation_name", "gen_ai_request_model")
_TOKENS = (1, 4, 16, 64, 256, 1024, 2048, 4096, 8192)

TIME_TO_FIRST_TOKEN = Histogram(
    "gen_ai_server_time_to_first_token_seconds",
    "From a request's arrival to its first token.",
    _GEN_AI,
    buckets=(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 30.0, 60.0),
    registry=REGISTRY,
)
TIME_PER_OUTPUT_TOKEN = Histogram(
    "gen_ai_server_time_per_output_token_seconds",
    "Mean time between a request's tokens after the first, once a request.",
    _GEN_AI,
    buckets=(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5),
    registry=REGISTRY,
)
REQUEST_DURATION = Histogram(
    "gen_ai_server_request_duration_seconds",
    "From a request's arrival to its end. error_type is the status code's name, empty for OK.",
    (*_GEN_AI, "error_type"),
    buckets=(0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24, 20.48, 40.96, 81.92),
    registry=REGISTRY,
)
REQUESTS = Counter("grokmesh_gateway_requests", "Calls that ended.", ["method", "code"], registry=REGISTRY)
FAILURES = Counter(
    "grokmesh_gateway_failures",
    "Completions that ended by no choice of the caller's: errors of the service, requests that it turned away, deadlines that "
    "it missed. What a key's own limits turn away is not among them.",
    ["code"],
    registry=REGISTRY,
)
REJECTIONS = Counter(
    "grokmesh_gateway_rejections", "Completions that were not admitted.", ["reason"], registry=REGISTRY
)
REJECTION_SECONDS = Histogram(
    "grokmesh_gateway_rejection_seconds",
    "Time within the gateway of a completion that was turned away with RESOURCE_EXHAUSTED.",
    buckets=(0.0005, 0.001, 0.0025, 0.005, 0.01, 0.02, 0.05, 0.1, 0.5, 1.0),
    registry=REGISTRY,
)
COMPLETIONS = Counter(
    "grokmesh_gateway_completions", "Admitted completions that ended.", ["key", "finish_reason"], registry=REGISTRY
)
TOKENS = Counter(
    "grokmesh_gateway_tokens", "Tokens of admitted completions, by API key.", ["key", "kind"], registry=REGISTRY
)
PROMPT_LENGTH = Histogram(
    "grokmesh_gateway_prompt_length_tokens", "Tokens of a prompt.", buckets=_TOKENS, registry=REGISTRY
)
COMPLETION_LENGTH = Histogram(
    "grokmesh_gateway_completion_length_tokens", "Tokens of a completion.", buckets=_TOKENS, registry=REGISTRY
)
ROUTED = Counter(
    "grokmesh_gateway_routed_sessions",
    "Completions that were sent to a replica, by why to that one: prefix, as it likely has the prompt's beginning; load, as "
    "others had too much to do, or the prompt is short; only, as there was no other.",
    ["cause"],
    registry=REGISTRY,
)
IN_FLIGHT = Gauge("grokmesh_gateway_requests_in_flight", "Completions in the gateway.", registry=REGISTRY)
QUEUED = Gauge(
    "grokmesh_gateway_queued_requests", "Completions in the gateway that have no token yet.", registry=REGISTRY
)
LOOP_LAG = Histogram(
    "grokmesh_gateway_loop_lag_seconds",
    "How late the gateway's event loop comes to what is due, taken twenty times a second. All requests wait for it.",
    buckets=(0.001, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0),
    registry=REGISTRY,
)
REPLICAS_READY = Gauge("grokmesh_replicas_ready", "Replicas that serve.", registry=CONTROLLER)
REPLICAS_WANTED = Gauge("grokmesh_replicas_wanted", "Replicas that should serve.", registry=CONTROLLER)
EPOCH = Gauge("grokmesh_replica_epoch", "Epoch of a replica's mesh.", ["replica"], registry=CONTROLLER)
REBUILDS = Counter(
    "grokmesh_replica_rebuilds", "Meshes that were formed again after a failure.", ["replica"], registry=CONTROLLER
)
REPLICA_FAILURES = Gauge(
    "grokmesh_replica_failures_in_a_row",
    "Epochs of a replica that failed one after the other.",
    ["replica"],
    registry=CONTROLLER,
)
MISSING_HOSTS = Gauge(
    "grokmesh_replica_missing_hosts",
    "Hosts by which a replica's mesh is smaller than configured.",
    ["replica"],
    registry=CONTROLLER,
)
HOST_LOSSES = Counter(
    "grokmesh_host_losses", "Workers of a host that died or did not answer.", ["address"], registry=CONTROLLER
)
SESSIONS_RESUMED = Counter(
    "grokmesh_sessions_resumed",
    "Completions that went on elsewhere, or later, when their replica was lost.",
    registry=REGISTRY,
)
BUILD = Gauge("grokmesh_build_info", "Always 1; the label says what runs.", ["version"], registry=REGISTRY)


def begin(version: str) -> None:
    """Makes the series that alerts divide by and subtract, so that they are there, at zero, before their first event."""
    BUILD.labels(version).set(1)
    for method in COMPLETING:
        for code in SERVER_CODES:
            REQUESTS.labels(method, code)
    for code in FAILURE_CODES:
        FAILURES.labels(code)
    for reason in REJECTION_REASONS:
        REJECTIONS.labels(reason)
    for cause in ("prefix", "load", "only"):
        ROUTED.labels(cause)
