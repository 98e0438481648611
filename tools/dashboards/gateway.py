"""The gateway, and what each API key uses."""

from tools.dashboards.panels import Dashboard, Panel, Query, Row, quantiles, rate, total

GATEWAY = Dashboard(
    uid="grokmesh-gateway",
    title="Grokmesh / Gateway and tenants",
    description="Admission, calls, and usage by API key.",
    rows=(
        Row(
            "Admission",
            (
                Panel(
                    "Completions in the gateway",
                    "All of them, and those that have no token yet. When they near gateway.max_requests, new ones are turned away.",
                    "short",
                    (
                        Query(total("grokmesh_gateway_requests_in_flight", "model"), "in flight"),
                        Query(total("grokmesh_gateway_queued_requests", "model"), "without a token"),
                    ),
                ),
                Panel(
                    "Turned away",
                    "A second, by reason. full: gateway.max_requests. queue: it would wait longer than gateway.queue_seconds or its "
                    "deadline allow. engine_full: engine.max_waiting. no_replica: none serves. "
                    "draining: the gateway is stopping. unauthenticated: no known API key, scope: not for this. key_requests, key_tokens: "
                    "the limits of a key.",
                    "reqps",
                    (Query(rate("grokmesh_gateway_rejections_total", "reason"), "{{reason}}"),), "stacked",
                ),
                Panel(
                    "Time to turn away",
                    "From a completion's arrival to its RESOURCE_EXHAUSTED. Above 20 ms the gateway's process itself is short of "
                    "time: give it cores, or add a gateway.",
                    "s", quantiles("grokmesh_gateway_rejection_seconds"), warn=0.02, bad=0.1,
                ),
                Panel(
                    "Calls by method and code",
                    "A second. INVALID_ARGUMENT in numbers: a client with a mistake; its field is named in the error it gets.",
                    "reqps",
                    (Query(rate("grokmesh_gateway_requests_total", "method, code"), "{{method}} {{code}}"),), "stacked",
                ),
                Panel(
                    "Why sessions go where they go",
                    "A second. prefix: to the replica that likely has the prompt's beginning in its cache. load: elsewhere, as that one "
                    "has much more to do than others, or the prompt is short. only: there is no other.",
                    "reqps", (Query(rate("grokmesh_gateway_routed_sessions_total", "cause"), "{{cause}}"),), "stacked",
                ),
                Panel(
                    "Lag of the event loop",
                    "How late the gateway comes to what is due. All streams wait for it. Above 50 ms: it is short of a core, or one "
                    "request holds it up; telemetry.stall_seconds has the log name what does.",
                    "s", quantiles("grokmesh_gateway_loop_lag_seconds"), warn=0.02, bad=0.05,
                ),
            ),
        ),
        Row(
            "Tenants",
            (
                Panel(
                    "Completion tokens by key",
                    "A second. `anonymous` where the gateway asks for no keys. One key that takes most of it slows the others down.",
                    "short",
                    (Query(rate("grokmesh_gateway_tokens_total", "key", ', kind="completion"'), "{{key}}"),), "stacked",
                ),
                Panel(
                    "Prompt tokens by key",
                    "A second. Long prompts cost prefill time, which everybody's tokens wait for.",
                    "short",
                    (Query(rate("grokmesh_gateway_tokens_total", "key", ', kind="prompt"'), "{{key}}"),), "stacked",
                ),
                Panel(
                    "Ends of completions by key",
                    "A second, by reason: eos, stop and length are whole; cancelled and error are not. Many cancelled ones of one "
                    "key: its deadlines are too short.",
                    "reqps",
                    (Query(rate("grokmesh_gateway_completions_total", "key, finish_reason"), "{{key}}: {{finish_reason}}"),),
                    "stacked",
                ),
            ),
        ),
        Row(
            "Lengths",
            (
                Panel(
                    "Length of prompts",
                    "In tokens. A change explains a change of the time to first token.",
                    "short", quantiles("grokmesh_gateway_prompt_length_tokens"),
                ),
                Panel(
                    "Length of completions",
                    "In tokens. Longer ones hold slots and pages for longer; if they have grown, so will the queue.",
                    "short", quantiles("grokmesh_gateway_completion_length_tokens"),
                ),
                Panel(
                    "Version",
                    "What runs. Two at once: a successor is taking over, or an upgrade was left half done; see `grokmesh status`.",
                    "short", (Query(total("grokmesh_build_info", "version, model"), "{{version}} {{model}}"),), "stat",
                ),
            ),
        ),
    ),
)  # fmt: skip
