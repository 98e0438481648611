"""Pictures of the dashboards and the playground for docs/: python -m tools.pictures [playground]

There is no Grafana in this: a two-host service runs under load, a real Prometheus scrapes it, and this program asks it the
queries of every panel, as the JSON of the dashboards has them, draws the answers as SVG into a page laid out like the
dashboard, and lets headless Chromium make a PNG of it.
"""

from __future__ import annotations

import asyncio
import html
import json
import math
import pathlib
import re
import sys
import tempfile
import time
from typing import Any

from tests.support.chromium import browsing, chromium
from tests.support.monitored import Stage, filled, monitored
from tests.support.ports import free_port
from tests.support.service import running
from tools.dashboards.build import FOLDER

OUTPUT = pathlib.Path(__file__).parent.parent / "docs" / "images"
SECONDS, STEP = 90.0, 2.0
_COLUMN, _ROW, _GAP = 54, 30, 6
_COLORS = ("#3274d9", "#e0b400", "#56a64b", "#e02f44", "#8f3bb8", "#ff780a", "#37872d", "#6ed0e0", "#b877d9", "#c4162a")

Points = list[tuple[float, float]]


def main() -> int:
    """Draws all dashboards, and the playground, into docs/images."""
    OUTPUT.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        asyncio.run(_playground(pathlib.Path(folder)))
    if sys.argv[1:] == ["playground"]:
        return 0
    with tempfile.TemporaryDirectory() as folder, monitored(pathlib.Path(folder)) as stage:
        time.sleep(SECONDS + 15)
        for path in sorted(FOLDER.glob("*.json")):
            page = pathlib.Path(folder) / f"{path.stem}.html"
            width, height = draw(stage, json.loads(path.read_text()), page)
            shot = OUTPUT / f"{path.stem}.png"
            size = f"--window-size={width},{height}"
            chromium(
                pathlib.Path(folder) / "chromium", "--hide-scrollbars", size, f"--screenshot={shot}", page.as_uri()
            )
            print(f"{shot}: {shot.stat().st_size:,} bytes")
    return 0


async def _playground(folder: pathlib.Path) -> None:
    """The page of a two-host service, with a completion of which one token is looked at."""
    address = f"127.0.0.1:{free_port('127.0.0.1')}"
    mesh = {"hosts": 2, "devices_per_host": 2, "data": 2, "model": 2}
    with running(folder, mesh=mesh, gateway={"http_address": address}):
        async with browsing(folder / "chromium", f"http://{address}/", height=1150) as page:
            await page.until("typeof model !== 'undefined' && model")
            await page.do("at('prompt').value = 'And it came to pass'; at('seed').value = '7'; at('run').click()")
            await page.until("!running && tokens.length > 40")
            await page.do("show(12)")
            await page.until("[...at('experts').querySelectorAll('td')].some(cell => /[1-9]/.test(cell.textContent))")
            assert await page.do("at('token').querySelectorAll('tr').length") == 5
            await page.picture(OUTPUT / "playground.png")
            print(f"{OUTPUT / 'playground.png'}")


def draw(stage: Stage, dashboard: dict[str, Any], page: pathlib.Path) -> tuple[int, int]:
    """Writes a dashboard as a page; its width and height in pixels."""
    parts, bottom = [], 0
    for panel in dashboard["panels"]:
        place = panel["gridPos"]
        bottom = max(bottom, place["y"] + place["h"])
        x, y = place["x"] * _COLUMN + 12, place["y"] * _ROW + 60
        width, height = place["w"] * _COLUMN - _GAP, place["h"] * _ROW - _GAP
        title = html.escape(panel["title"])
        if panel["type"] == "row":
            parts.append(f'<text x="{x}" y="{y + 20}" class="row">{title}</text>')
            continue
        parts.append(f'<g transform="translate({x},{y})"><rect width="{width}" height="{height}" class="panel"/>')
        parts.append(f'<text x="8" y="18" class="title">{title}</text>{_content(stage, panel, width, height)}</g>')
    total = bottom * _ROW + 72
    style = (
        "body{margin:0;background:#f4f5f5}text{font:11px sans-serif;fill:#24292e}.panel{fill:#fff;stroke:#dcdee0}"
        ".title{font-weight:600;font-size:12px}.row{font-size:14px;font-weight:600}.soft{fill:#75808c;font-size:10px}"
        ".big{font-size:30px;font-weight:600;fill:#37872d}.head{font-size:18px;font-weight:600}"
    )
    width = 24 * _COLUMN + 20
    head = f'<text x="12" y="30" class="head">{html.escape(dashboard["title"])}</text>'
    page.write_text(
        f"<!doctype html><meta charset=utf-8><style>{style}</style>"
        f'<svg width="{width}" height="{total}">{head}{"".join(parts)}</svg>'
    )
    return width, total


def _content(stage: Stage, panel: dict[str, Any], width: int, height: int) -> str:
    unit = panel["fieldConfig"]["defaults"]["unit"]
    series = _series(stage, panel)
    match panel["type"]:
        case "stat":
            shown = [f"{_format(points[-1][1], unit)}" for _, points in series if points]
            return f'<text x="12" y="{height / 2 + 22}" class="big">{html.escape(" / ".join(shown))}</text>'
        case "bargauge":
            return _bars([(name, points[-1][1]) for name, points in series if points], width, height, unit)
        case "heatmap":
            return _heat(series, width, height)
    stacked = panel["fieldConfig"]["defaults"].get("custom", {}).get("stacking", {}).get("mode") == "normal"
    return _lines(series, width, height, unit, stacked)


def _series(stage: Stage, panel: dict[str, Any]) -> list[tuple[str, Points]]:
    found = []
    for target in panel["targets"]:
        for result in stage.query_range(filled(target["expr"]), SECONDS, STEP):
            name = target["legendFormat"]
            for label, value in result["metric"].items():
                name = name.replace("{{" + label + "}}", value)
            name = re.sub(r"\{\{\w+\}\}", "", name).strip()  # as Grafana does with labels that are not there
            points = [(float(at), float(value)) for at, value in result["values"]]
            found.append((name, [(at, value) for at, value in points if math.isfinite(value)]))
    return found


def _lines(series: list[tuple[str, Points]], width: int, height: int, unit: str, stacked: bool) -> str:
    if stacked:
        below: dict[float, float] = {}
        sums = []
        for name, points in series:
            for at, value in points:
                below[at] = below.get(at, 0.0) + value
            sums.append((name, [(at, below[at]) for at, _ in points]))
        series = sums
    values = [value for _, points in series for _, value in points]
    times = [at for _, points in series for at, _ in points]
    if not values:
        return f'<text x="12" y="{height / 2}" class="soft">no data in these {SECONDS:.0f} seconds</text>'
    low, high = min(0.0, *values), (max(values) if max(values) > 0 else 1.0) * 1.08
    first, last = min(times), max(max(times), min(times) + 1)
    left, top, plot_width, plot_height = 56, 28, width - 66, height - 64

    def place(at: float, value: float) -> str:
        x = left + (at - first) / (last - first) * plot_width
        return f"{x:.1f},{top + plot_height * (1 - (value - low) / (high - low)):.1f}"

    parts = []
    for i in range(4):
        value = low + (high - low) * i / 3
        y = float(place(first, value).split(",")[1])
        parts.append(f'<line x1="{left}" x2="{left + plot_width}" y1="{y}" y2="{y}" stroke="#eceef0"/>')
        parts.append(f'<text x="{left - 4}" y="{y + 3}" text-anchor="end" class="soft">{_format(value, unit)}</text>')
    legend_x = 8.0
    for i, (name, points) in enumerate(series):
        color = _COLORS[i % len(_COLORS)]
        path = " ".join(place(at, value) for at, value in points)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="1.4"/>')
        if legend_x < width - 60:
            parts.append(f'<rect x="{legend_x}" y="{height - 16}" width="8" height="8" fill="{color}"/>')
            parts.append(f'<text x="{legend_x + 11}" y="{height - 8}" class="soft">{html.escape(name[:34])}</text>')
        legend_x += 24 + 5.6 * min(len(name), 34)
    return "".join(parts)


def _heat(series: list[tuple[str, Points]], width: int, height: int) -> str:
    """A row a series; cumulative buckets are made single ones first."""
    if series and all(_is_number(name) for name, _ in series):
        series = sorted(series, key=lambda entry: float(entry[0]))
        before: dict[float, float] = {}
        single = []
        for name, points in series:
            single.append((name, [(at, max(value - before.get(at, 0.0), 0.0)) for at, value in points]))
            before = dict(points)
        series = single
    most = max((value for _, points in series for _, value in points), default=0.0) or 1.0
    times = sorted({at for _, points in series for at, _ in points})
    rows, parts = max(len(series), 1), []
    left, top, cell_height = 62, 28, (height - 36) / rows
    cell_width = (width - 70) / max(len(times), 1)
    column = {at: i for i, at in enumerate(times)}
    for row, (name, points) in enumerate(series):
        y = top + (rows - 1 - row) * cell_height
        parts.append(f'<text x="{left - 4}" y="{y + cell_height / 2 + 3}" text-anchor="end" class="soft">{name}</text>')
        for at, value in points:
            x, light = left + column[at] * cell_width, 97 - 55 * value / most
            place = f'x="{x:.1f}" y="{y:.1f}" width="{cell_width:.1f}" height="{cell_height - 1:.1f}"'
            parts.append(f'<rect {place} fill="hsl(24 90% {light:.0f}%)"/>')
    return "".join(parts)


def _bars(values: list[tuple[str, float]], width: int, height: int, unit: str) -> str:
    """As many bars as there is room for, in columns."""
    columns, line = 4, 13
    per_column = max((height - 36) // line, 1)
    most = max((value for _, value in values), default=0.0) or 1.0
    parts = []
    for i, (name, value) in enumerate(values[: columns * per_column]):
        x, y = 8 + i // per_column * (width - 16) / columns, 30 + i % per_column * line
        color = "#56a64b" if value < 0.3 else "#e0b400" if value < 0.5 else "#e02f44"
        parts.append(f'<rect x="{x}" y="{y}" width="{value / most * 60:.1f}" height="9" fill="{color}"/>')
        text = f"{_format(value, unit)} {html.escape(name)}"
        parts.append(f'<text x="{x + 64}" y="{y + 8}" class="soft">{text}</text>')
    return "".join(parts)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _format(value: float, unit: str) -> str:
    if unit == "percentunit":
        return f"{value * 100:.3g} %"
    if unit == "s":
        return f"{value * 1000:.3g} ms" if abs(value) < 1 else f"{value:.3g} s"
    for size, name in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g} {name}{'B' if unit in ('bytes', 'Bps') else ''}{'/s' if unit == 'Bps' else ''}"
    return f"{value:.3g}"


if __name__ == "__main__":
    sys.exit(main())
