"""What a dashboard is made of, and how Grafana's JSON is built of it."""

from __future__ import annotations

import dataclasses
import json
from typing import Any, Literal

from grafana_foundation_sdk.builders import bargauge, common, heatmap, prometheus, stat, timeseries
from grafana_foundation_sdk.builders import dashboard as builders
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models import common as common_models
from grafana_foundation_sdk.models import dashboard as models
from grafana_foundation_sdk.models import heatmap as heatmap_models
from grafana_foundation_sdk.models import prometheus as prometheus_models

Kind = Literal["lines", "stacked", "stat", "bars", "heat"]

_HEIGHT = 8
_STAT_HEIGHT = 4
_COLUMNS = 24
_DATASOURCE = models.DataSourceRef(type_val="prometheus", uid="${datasource}")


@dataclasses.dataclass(frozen=True)
class Query:
    """A PromQL expression, and how its series are named."""

    expr: str
    legend: str = ""


@dataclasses.dataclass(frozen=True)
class Panel:
    """One panel.

    Attributes:
      title: what it shows.
      description: what it means, and what to do when it looks bad.
      unit: Grafana's name of the unit.
      queries: at least one.
      kind: how it is drawn.
      warn, bad: values from which it turns yellow and red; the other way round if bad is less than warn.
      width: of 24 columns.
    """

    title: str
    description: str
    unit: str
    queries: tuple[Query, ...]
    kind: Kind = "lines"
    warn: float | None = None
    bad: float | None = None
    width: int = 8


@dataclasses.dataclass(frozen=True)
class Row:
    """Panels under a heading."""

    title: str
    panels: tuple[Panel, ...]


@dataclasses.dataclass(frozen=True)
class Dashboard:
    """A dashboard with variables `datasource` and `model`."""

    uid: str
    title: str
    description: str
    rows: tuple[Row, ...]


def to_json(dashboard: Dashboard) -> str:
    """The dashboard as Grafana imports it. The same definition gives the same text."""
    model_query: dict[str, object] = {"query": "label_values(grokmesh_build_info, model)", "refId": "models"}
    builder = (
        builders.Dashboard(dashboard.title)
        .uid(dashboard.uid)
        .description(dashboard.description)
        .tags(["grokmesh"])
        .editable()
        .refresh("10s")
        .time("now-1h", "now")
        .timezone("browser")
        .tooltip(models.DashboardCursorSync.CROSSHAIR)
        .with_variable(builders.DatasourceVariable("datasource").label("Data source").type("prometheus"))
        .with_variable(
            builders.QueryVariable("model")
            .label("Model")
            .datasource(_DATASOURCE)
            .query(model_query)
            .refresh(models.VariableRefresh.ON_TIME_RANGE_CHANGED)
            .include_all(True)
            .all_value(".*")
            .multi(True)
        )
    )
    for row in dashboard.rows:
        builder = builder.with_row(builders.Row(row.title))
        for panel in row.panels:
            builder = builder.with_panel(_panel(panel))
    return json.dumps(builder.build(), cls=JSONEncoder, indent=1, sort_keys=True) + "\n"


def _panel(panel: Panel) -> Any:
    builder: Any
    height = _HEIGHT
    match panel.kind:
        case "stat":
            height = _STAT_HEIGHT
            builder = stat.Panel().color_mode(common_models.BigValueColorMode.VALUE)
        case "bars":
            builder = bargauge.Panel().orientation(common_models.VizOrientation.HORIZONTAL)
            builder = builder.display_mode(common_models.BarGaugeDisplayMode.BASIC)
        case "heat":
            colors = (
                heatmap.HeatmapColorOptions().mode(heatmap_models.HeatmapColorMode.SCHEME).scheme("Oranges").steps(64)
            )
            builder = heatmap.Panel().color(colors).cell_gap(1)
        case _:
            builder = timeseries.Panel().line_width(1).fill_opacity(40 if panel.kind == "stacked" else 8)
            if panel.kind == "stacked":
                builder = builder.stacking(common.StackingConfig().mode(common_models.StackingMode.NORMAL))
            legend = common.VizLegendOptions().show_legend(True).placement(common_models.LegendPlacement.BOTTOM)
            legend = legend.display_mode(common_models.LegendDisplayMode.LIST)
            builder = builder.legend(legend).tooltip(
                common.VizTooltipOptions().mode(common_models.TooltipDisplayMode.MULTI)
            )
    builder = builder.title(panel.title).description(panel.description).unit(panel.unit).datasource(_DATASOURCE)
    builder = builder.height(height).span(min(panel.width, _COLUMNS))
    if panel.warn is not None and panel.bad is not None:
        builder = builder.thresholds(_thresholds(panel.warn, panel.bad))
        if panel.kind == "lines":
            style = common.GraphThresholdsStyleConfig().mode(common_models.GraphThresholdsStyleMode.DASHED)
            builder = builder.thresholds_style(style)
    for index, query in enumerate(panel.queries):
        target = prometheus.Dataquery().expr(query.expr).ref_id(chr(ord("A") + index)).legend_format(query.legend)
        if panel.kind == "heat":
            target = target.format(prometheus_models.PromQueryFormat.HEATMAP)
        target = target.instant() if panel.kind == "bars" else target.range()
        builder = builder.with_target(target)
    return builder


def _thresholds(warn: float, bad: float) -> builders.ThresholdsConfig:
    colors = ("green", "yellow", "red") if bad >= warn else ("red", "yellow", "green")
    bounds = (None, *sorted((warn, bad)))
    steps = [models.Threshold(value=value, color=color) for value, color in zip(bounds, colors, strict=True)]
    return builders.ThresholdsConfig().mode(models.ThresholdsMode.ABSOLUTE).steps(steps)


def quantiles(metric: str, selector: str = "", by: str = "model") -> tuple[Query, ...]:
    """Median, 90th and 99th percentile of a histogram."""
    inner = f'sum by (le, {by}) (rate({metric}_bucket{{model=~"$model"{selector}}}[$__rate_interval]))'
    return tuple(
        Query(f"histogram_quantile({fraction}, {inner})", f"{name} {{{{{by}}}}}")
        for fraction, name in ((0.5, "median"), (0.9, "90 %"), (0.99, "99 %"))
    )


def rate(metric: str, by: str, selector: str = "") -> str:
    """Sum of a counter's rate by a label."""
    return f'sum by ({by}) (rate({metric}{{model=~"$model"{selector}}}[$__rate_interval]))'


def total(metric: str, by: str, selector: str = "") -> str:
    """Sum of a gauge by a label."""
    return f'sum by ({by}) ({metric}{{model=~"$model"{selector}}})'
