"""The service as its users see it, against its objectives."""

from cluster.telemetry.metrics import COMPLETING
from tools.dashboards.panels import Dashboard, Panel, Query, Row, quantiles, rate, total

_TTFT = "gen_ai_server_time_to_first_token_seconds"
_TPOT = "gen_ai_server_time_per_output_token_seconds"
_COMPLETIONS = f', method=~"{"|".join(COMPLETING)}"'

SERVICE = Dashboard(
    uid="grokmesh-service",
    title="Grokmesh / Service",
    description="Errors, latency and throughput against the objectives. Begin here.",
    rows=(
        Row(
            "Now",
            (
                Panel(
                    "Completions without error, last hour",
                    "Share of completions that did not end with a fault of the service (UNAVAILABLE, INTERNAL, "
                    "RESOURCE_EXHAUSTED but for keys' own limits, DEADLINE_EXCEEDED). The objective is 99.9 %. Below it: see which "
                    "code is to blame under Requests by code, then the runbook, GrokmeshErrorBudgetBurns.",
                    "percentunit",
                    (Query('1 - grokmesh:request_errors:ratio_rate1h{model=~"$model"}', "{{model}}"),),
                    "stat", 0.999, 0.99, 6,
                ),
                Panel(
                    "First tokens within 2.5 s, last hour",
                    "The objective is 99 %. Below it requests wait for slots (Engine, time in the queue) or prefill is slow "
                    "(Engine, step time): add replicas or shorten prompts.",
                    "percentunit",
                    (Query('1 - grokmesh:slow_first_tokens:ratio_rate1h{model=~"$model"}', "{{model}}"),),
                    "stat", 0.99, 0.95, 6,
                ),
                Panel(
                    "Replicas that serve",
                    "Less than wanted: a mesh is being formed, or hosts are missing; see Cluster and mesh, and `grokmesh status`.",
                    "short",
                    (
                        Query(total("grokmesh_replicas_ready", "model"), "ready"),
                        Query(total("grokmesh_replicas_wanted", "model"), "wanted"),
                    ),
                    "stat", 1, 0.5, 6,
                ),
                Panel(
                    "Tokens per second",
                    "Tokens that clients get. It falls with the load, or when steps grow slow (Engine, step time).",
                    "short",
                    (Query(rate("grokmesh_gateway_tokens_total", "model", ', kind="completion"'), "{{model}}"),),
                    "stat", width=6,
                ),
            ),
        ),
        Row(
            "Requests",
            (
                Panel(
                    "Requests by code",
                    "Completions that ended, a second. UNAVAILABLE: no replica, or one was lost. RESOURCE_EXHAUSTED: too many at "
                    "once. INTERNAL: a defect, look for level=error in the gateway's log. CANCELLED: clients that went away.",
                    "reqps",
                    (Query(rate("grokmesh_gateway_requests_total", "code", _COMPLETIONS), "{{code}}"),),
                    "stacked",
                ),
                Panel(
                    "Burn rate of the error budget",
                    "How many times faster than 99.9 % allows errors come, over one and six hours. Above 1 the budget of 30 days "
                    "will not last; the alerts page at 14.4 and 6.",
                    "short",
                    (
                        Query('grokmesh:request_errors:ratio_rate1h{model=~"$model"} / 0.001', "1 h {{model}}"),
                        Query('grokmesh:request_errors:ratio_rate6h{model=~"$model"} / 0.001', "6 h {{model}}"),
                    ),
                    warn=6, bad=14.4,
                ),
                Panel(
                    "Burn rate of slow first tokens",
                    "The same for first tokens that take longer than 2.5 s, of which 1 % may. See time in the queue on Engine.",
                    "short",
                    (
                        Query('grokmesh:slow_first_tokens:ratio_rate1h{model=~"$model"} / 0.01', "1 h {{model}}"),
                        Query('grokmesh:slow_first_tokens:ratio_rate6h{model=~"$model"} / 0.01', "6 h {{model}}"),
                    ),
                    warn=6, bad=14.4,
                ),
            ),
        ),
        Row(
            "Latency",
            (
                Panel(
                    "Time to first token",
                    "From a request's arrival to its first token: queue, then prefill. Objective: 99 % within 2.5 s. If it grows "
                    "with the queue (Engine), add replicas; if it grows alone, prompts have become longer.",
                    "s", quantiles(_TTFT), warn=1, bad=2.5,
                ),
                Panel(
                    "Time per output token",
                    "Mean of each request after its first token. It grows with the batch and with long prefills beside it; a jump "
                    "without more load points at a slow host (Cluster and mesh, time of a collective).",
                    "s", quantiles(_TPOT),
                ),
                Panel(
                    "Duration of requests",
                    "From arrival to end, of all requests. Long ones ask for many tokens; compare with completion length on Gateway.",
                    "s", quantiles("gen_ai_server_request_duration_seconds"),
                ),
            ),
        ),
        Row(
            "Throughput",
            (
                Panel(
                    "Tokens a second",
                    "Prompt tokens taken in and completion tokens given out. Many prompt tokens slow decoding down: the two share "
                    "the devices.",
                    "short",
                    (Query(rate("grokmesh_gateway_tokens_total", "kind"), "{{kind}}"),), width=12,
                ),
                Panel(
                    "First tokens by time",
                    "How many first tokens took how long. Two bands mean two kinds of request, or a replica that is slower than "
                    "the others.",
                    "s",
                    (
                        Query(
                            f'sum by (le) (increase({_TTFT}_bucket{{model=~"$model"}}[$__rate_interval]))', "{{le}}"
                        ),
                    ),
                    "heat", width=12,
                ),
            ),
        ),
    ),
)  # fmt: skip
