"""What a worker process tells Prometheus."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, disable_created_metrics

#: All metrics of this process, without those of other kinds of process that share its code.
REGISTRY = CollectorRegistry()
ProcessCollector(registry=REGISTRY)
disable_created_metrics()

EPOCH = Gauge("grokmesh_worker_epoch", "Epoch of the mesh that this worker belongs to.", registry=REGISTRY)
COMPILATIONS = Counter("grokmesh_worker_compilations", "XLA programs compiled by this process.", registry=REGISTRY)
CHECKPOINT_BYTES = Counter(
    "grokmesh_worker_checkpoint_read_bytes", "Checkpoint bytes read by this host.", registry=REGISTRY
)
PLANS = Counter("grokmesh_worker_plans", "Plans carried out by this worker.", registry=REGISTRY)
STEP_SECONDS = Histogram(
    "grokmesh_engine_step_seconds",
    "Time from one step's tokens to the next one's, while the engine is busy.",
    buckets=(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5),
    registry=REGISTRY,
)
HOST_SECONDS = Counter(
    "grokmesh_engine_host_seconds",
    "Time that the leader's loop spends on each part of its steps.",
    ["part"],
    registry=REGISTRY,
)
PROMPT_TOKENS = Counter("grokmesh_engine_prompt_tokens", "Prompt positions computed.", registry=REGISTRY)
GENERATED_TOKENS = Counter("grokmesh_engine_generated_tokens", "Tokens delivered to gateways.", registry=REGISTRY)
RUNNING = Gauge("grokmesh_engine_running_requests", "Requests that have a slot.", registry=REGISTRY)
WAITING = Gauge("grokmesh_engine_waiting_requests", "Requests that wait for a slot.", registry=REGISTRY)
PAGES_USED = Gauge("grokmesh_engine_kv_pages_used", "Pages of the KV cache that requests own.", registry=REGISTRY)
PAGES_TOTAL = Gauge("grokmesh_engine_kv_pages", "Pages of the KV cache.", registry=REGISTRY)
