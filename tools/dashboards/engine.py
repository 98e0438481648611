"""What the leaders' engines do: batches, queue, KV pages, where a step's time goes."""

from tools.dashboards.panels import Dashboard, Panel, Query, Row, quantiles, rate, total

ENGINE = Dashboard(
    uid="grokmesh-engine",
    title="Grokmesh / Engine",
    description="Batching, queue, KV cache and step time of each replica.",
    rows=(
        Row(
            "Requests",
            (
                Panel(
                    "Requests with a slot",
                    "Sequences that decode or prefill, beside the slots that there are. All slots taken for long: requests wait; "
                    "add replicas, or slots if memory allows (engine.slots).",
                    "short",
                    (
                        Query(total("grokmesh_engine_running_requests", "replica"), "running, replica {{replica}}"),
                        Query(total("grokmesh_engine_slots", "replica"), "slots, replica {{replica}}"),
                    ),
                ),
                Panel(
                    "Requests that wait",
                    "Without a slot or without pages. More than a few for long: the replica is overloaded; let the autoscaler add "
                    "one (autoscaling.max_replicas).",
                    "short",
                    (Query(total("grokmesh_engine_waiting_requests", "replica"), "replica {{replica}}"),), warn=8, bad=64,
                ),
                Panel(
                    "Time in the queue",
                    "From arrival at the leader to a slot. It is the part of the time to first token that more replicas take away.",
                    "s", quantiles("grokmesh_engine_queue_seconds", by="replica"), warn=0.5, bad=2,
                ),
            ),
        ),
        Row(
            "Steps",
            (
                Panel(
                    "Time of a step",
                    "From one step's tokens to the next one's, while busy: what a client waits for each token. The 99th percentile "
                    "holds the steps with a prefill chunk; if it hurts, make engine.prefill_chunk smaller.",
                    "s", quantiles("grokmesh_engine_step_seconds", by="replica"),
                ),
                Panel(
                    "Where the leader's time goes",
                    "Seconds a second that its loop spends on each part. `dispatch` and `device` are the computation (on CPU it "
                    "runs in `dispatch`); `plan`, `broadcast` and `deliver` are our own Python, and should be a few percent.",
                    "percentunit",
                    (Query(rate("grokmesh_engine_host_seconds_total", "part"), "{{part}}"),), "stacked",
                ),
                Panel(
                    "Sequences that decode together",
                    "A larger batch gives more tokens a second for nearly the same weights read. Always 1 or 2: the load is light, "
                    "or requests end too soon.",
                    "short", quantiles("grokmesh_engine_decode_batch_size", by="replica"),
                ),
            ),
        ),
        Row(
            "Tokens and memory",
            (
                Panel(
                    "Tokens a second of the engines",
                    "Prompt positions computed, tokens delivered, and prompt tokens scored. Generated tokens stop while requests run: look for a stuck "
                    "host (Cluster and mesh, plans behind).",
                    "short",
                    (
                        Query(rate("grokmesh_engine_prompt_tokens_total", "replica"), "prompt, replica {{replica}}"),
                        Query(rate("grokmesh_engine_generated_tokens_total", "replica"), "generated, replica {{replica}}"),
                        Query(rate("grokmesh_engine_scored_tokens_total", "replica"), "scored, replica {{replica}}"),
                    ),
                ),
                Panel(
                    "KV pages in use",
                    "Sequences get pages as they grow. At 100 % some lose theirs and are computed again later: raise "
                    "engine.kv_pages, or lower engine.slots.",
                    "percentunit",
                    (
                        Query(
                            f"{total('grokmesh_engine_kv_pages_used', 'replica')} / {total('grokmesh_engine_kv_pages', 'replica')}",
                            "replica {{replica}}",
                        ),
                    ),
                    warn=0.85, bad=0.95,
                ),
                Panel(
                    "Preemptions",
                    "Sequences that lost their pages to others and were computed again later, in the last hour. Their clients saw a "
                    "pause. Many: the KV cache is too small for so many slots (engine.kv_pages, engine.slots).",
                    "short",
                    (
                        Query(
                            'increase(grokmesh_engine_preemptions_total{model=~"$model"}[1h])', "replica {{replica}}"
                        ),
                    ),
                ),
                Panel(
                    "Prompt positions from the prefix cache",
                    "The share that need not be computed, as an earlier prompt or completion began alike, and the share of pages "
                    "that hold such prefixes. Low although prompts share a preamble: the pages are too few (engine.kv_pages).",
                    "percentunit",
                    (
                        Query(
                            'sum by (replica) (rate(grokmesh_engine_prefix_tokens_total{model=~"$model", result="hit"}[$__rate_interval])) / '
                            + rate("grokmesh_engine_prefix_tokens_total", "replica"),
                            "found, replica {{replica}}",
                        ),
                        Query(
                            f"{total('grokmesh_engine_kv_pages_cached', 'replica')} / {total('grokmesh_engine_kv_pages', 'replica')}",
                            "pages, replica {{replica}}",
                        ),
                    ),
                ),
                Panel(
                    "Guessed tokens",
                    "Tokens a second that were guessed from a sequence's own past and verified in one step, right or wrong. Guesses "
                    "are made only while few sequences run and theirs come true; many wrong ones would be a defect.",
                    "short", (Query(rate("grokmesh_engine_draft_tokens_total", "result"), "{{result}}"),),
                ),
                Panel(
                    "Prompt positions a step may compute",
                    "What engine.prefill_slowdown comes to on these hosts: the most prompt positions beside decoding, from measured "
                    "times. At 1 prompts crawl while others decode: allow a higher slowdown.",
                    "short", (Query(total("grokmesh_engine_prefill_budget", "replica"), "replica {{replica}}"),),
                ),
                Panel(
                    "Programs compiled",
                    "By each host, since its start. After warm-up the lines must stay flat: a step that compiles stalls everybody. "
                    "If they rise, see the runbook, GrokmeshCompilesWhileServing.",
                    "short",
                    (
                        Query(
                            'grokmesh_worker_compilations_total{model=~"$model"}', "replica {{replica}}, host {{rank}}"
                        ),
                    ),
                ),
            ),
        ),
    ),
)  # fmt: skip
