"""What the routers do with tokens."""

from tools.dashboards.panels import Dashboard, Panel, Query, Row, rate

_TOKENS = "grokmesh_moe_expert_tokens_total"
_BY_EXPERT = rate(_TOKENS, "expert")
_BY_LAYERS = rate(_TOKENS, "layers")
_BY_BOTH = rate(_TOKENS, "layers, expert")

EXPERTS = Dashboard(
    uid="grokmesh-experts",
    title="Grokmesh / Mixture of experts",
    description="Tokens of each expert, counted on the devices, by groups of layers.",
    rows=(
        Row(
            "Balance",
            (
                Panel(
                    "Tokens of each expert",
                    "All layers together, tokens a second. One dark row: most tokens go to one expert; with experts over devices "
                    "its device is the slowest. It is the model and the text that decide; a change of load shows first here.",
                    "short", (Query(_BY_EXPERT, "expert {{expert}}"),), "heat", width=12,
                ),
                Panel(
                    "Imbalance",
                    "Tokens of the busiest expert over the mean, for each group of layers: 1 is even, 8 is all on one. Above 3 for "
                    "long, steps with experts over devices take up to three times as long: use mesh.rules: tensor.",
                    "short",
                    (Query(f"max by (layers) ({_BY_BOTH}) / avg by (layers) ({_BY_BOTH})", "layers {{layers}}"),),
                    warn=2, bad=3, width=12,
                ),
            ),
        ),
        Row(
            "Groups of layers",
            (
                Panel(
                    "Share of each expert by group of layers",
                    "Now. Experts specialise differently in each layer; a group where one expert has most of the tokens explains a "
                    "peak of the imbalance.",
                    "percentunit",
                    (
                        Query(
                            f"{_BY_BOTH} / on (layers) group_left () {_BY_LAYERS}", "layers {{layers}}, expert {{expert}}"
                        ),
                    ),
                    "bars", 0.3, 0.5, 24,
                ),
                Panel(
                    "Tokens of each group of layers",
                    "Every layer sees every token, so equal groups must have equal rates. If they part, the counts are wrong.",
                    "short", (Query(_BY_LAYERS, "layers {{layers}}"),), width=24,
                ),
            ),
        ),
        Row(
            "Nothing is dropped",
            (
                Panel(
                    "Assignments that experts computed",
                    "What the experts' devices counted, over tokens times layers times chosen experts of the plans. No token is ever "
                    "dropped, so it is 100 %, but for the moment between the two counts. Less for long: runbook, "
                    "GrokmeshTokensDropped.",
                    "percentunit",
                    (
                        Query(
                            f"{rate(_TOKENS, 'replica')} / {rate('grokmesh_moe_assignments_total', 'replica')}",
                            "replica {{replica}}",
                        ),
                    ),
                    warn=0.99, bad=0.98, width=12,
                ),
                Panel(
                    "Assignments a second",
                    "Expert computations that the plans ask for, all layers: the measure of the work of the mixture.",
                    "short", (Query(rate("grokmesh_moe_assignments_total", "replica"), "replica {{replica}}"),), width=12,
                ),
            ),
        ),
    ),
)  # fmt: skip
