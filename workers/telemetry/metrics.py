"""A worker's metrics."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, disable_created_metrics

#: All metrics of this process, without those of other kinds of process that share its code.
REGISTRY = CollectorRegistry()
ProcessCollector(registry=REGISTRY)
#: Metrics that only the leader of a mesh has; see `lead`.
LEADER = CollectorRegistry()
disable_created_metrics()

_MILLISECONDS_TO_SECONDS = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)

EPOCH = Gauge("grokmesh_worker_epoch", "Epoch of the mesh that this worker belongs to.", registry=REGISTRY)
COMPILATIONS = Counter("grokmesh_worker_compilations", "XLA programs compiled by this process.", registry=REGISTRY)
CHECKPOINT_BYTES = Counter(
    "grokmesh_worker_checkpoint_read_bytes", "Checkpoint bytes read by this host.", registry=REGISTRY
)
CACHED_BYTES = Gauge(
    "grokmesh_worker_cached_weight_bytes", "Bytes of weights that lay in this host's weights cache.", registry=REGISTRY
)
TAKEN_BYTES = Gauge(
    "grokmesh_worker_taken_weight_bytes",
    "Bytes of weights that came from another host's weights cache.",
    registry=REGISTRY,
)
LOAD_SECONDS = Gauge("grokmesh_worker_load_seconds", "Time that loading the checkpoint took so far.", registry=REGISTRY)
DEVICE_BYTES = Gauge(
    "grokmesh_worker_device_memory_bytes", "Bytes on this host's devices.", ["kind"], registry=REGISTRY
)
PLANS = Counter("grokmesh_worker_plans", "Plans carried out by this worker.", registry=REGISTRY)
COLLECTIVE_SECONDS = Histogram(
    "grokmesh_mesh_collective_seconds",
    "Time of the smallest all-reduce over the mesh, as this host waits for it. Taken now and then while the engine is busy.",
    buckets=_MILLISECONDS_TO_SECONDS,
    registry=REGISTRY,
)

PLAN_LAG = Gauge(
    "grokmesh_mesh_plan_lag", "Plans sent to a follower that it has not carried out.", ["follower"], registry=LEADER
)
PLAN_SECONDS = Histogram(
    "grokmesh_mesh_plan_seconds",
    "From sending a plan to a follower until it says that it has carried it out.",
    ["follower"],
    buckets=_MILLISECONDS_TO_SECONDS,
    registry=LEADER,
)
STEP_SECONDS = Histogram(
    "grokmesh_engine_step_seconds",
    "Time from one step's tokens to the next one's, while the engine is busy.",
    buckets=_MILLISECONDS_TO_SECONDS,
    registry=LEADER,
)
HOST_SECONDS = Counter(
    "grokmesh_engine_host_seconds",
    "Time that the leader's loop spends on each part of its steps.",
    ["part"],
    registry=LEADER,
)
PROMPT_TOKENS = Counter("grokmesh_engine_prompt_tokens", "Prompt positions computed.", registry=LEADER)
GENERATED_TOKENS = Counter("grokmesh_engine_generated_tokens", "Tokens delivered to gateways.", registry=LEADER)
SCORED_TOKENS = Counter("grokmesh_engine_scored_tokens", "Prompt tokens scored for gateways.", registry=LEADER)
BATCH = Histogram(
    "grokmesh_engine_decode_batch_size",
    "Sequences that decode together in a step.",
    buckets=(1, 2, 4, 8, 16, 32, 64, 128, 256),
    registry=LEADER,
)
QUEUE_SECONDS = Histogram(
    "grokmesh_engine_queue_seconds",
    "From a request's arrival at the leader to its slot.",
    buckets=(0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0),
    registry=LEADER,
)
SLOTS = Gauge("grokmesh_engine_slots", "Sequences that can run at once.", registry=LEADER)
RUNNING = Gauge("grokmesh_engine_running_requests", "Requests that have a slot.", registry=LEADER)
WAITING = Gauge("grokmesh_engine_waiting_requests", "Requests that wait for a slot.", registry=LEADER)
PAGES_USED = Gauge("grokmesh_engine_kv_pages_used", "Pages of the KV cache that requests own.", registry=LEADER)
PAGES_TOTAL = Gauge("grokmesh_engine_kv_pages", "Pages of the KV cache.", registry=LEADER)
PREEMPTIONS = Counter(
    "grokmesh_engine_preemptions", "Sequences that lost their pages to others and were resumed later.", registry=LEADER
)
PAGES_CACHED = Gauge(
    "grokmesh_engine_kv_pages_cached", "Pages that hold prefixes which later prompts may share.", registry=LEADER
)
PREFIX_TOKENS = Counter(
    "grokmesh_engine_prefix_tokens",
    "Prompt positions by whether the prefix cache had them (hit) or they were computed (miss).",
    ["result"],
    registry=LEADER,
)
DRAFT_TOKENS = Counter(
    "grokmesh_engine_draft_tokens",
    "Guessed tokens that were verified, by result (right or wrong).",
    ["result"],
    registry=LEADER,
)
PREFILL_BUDGET = Gauge(
    "grokmesh_engine_prefill_budget", "Prompt positions that a step may compute beside decoding.", registry=LEADER
)
EXPERT_TOKENS = Counter(
    "grokmesh_moe_expert_tokens",
    "Tokens that an expert computed, counted on the devices and summed over a group of layers.",
    ["layers", "expert"],
    registry=LEADER,
)
ASSIGNMENTS = Counter(
    "grokmesh_moe_assignments",
    "Tokens times layers times chosen experts of the plans: what all experts together must compute, if none drops any.",
    registry=LEADER,
)


def lead() -> None:
    """Shows the leader's metrics too, from now on."""
    REGISTRY.register(LEADER)  # it collects, which is all that a collector must do
