"""Writes the dashboards as Grafana's JSON: python -m tools.dashboards.build [DIR]"""

from __future__ import annotations

import pathlib
import sys

from tools.dashboards.engine import ENGINE
from tools.dashboards.experts import EXPERTS
from tools.dashboards.gateway import GATEWAY
from tools.dashboards.mesh import MESH
from tools.dashboards.panels import to_json
from tools.dashboards.service import SERVICE

DASHBOARDS = (SERVICE, ENGINE, EXPERTS, MESH, GATEWAY)
FOLDER = pathlib.Path(__file__).parents[2] / "deploy" / "grafana" / "dashboards"


def main(folder: pathlib.Path) -> None:
    """Writes a file a dashboard, named by its uid."""
    for dashboard in DASHBOARDS:
        (folder / f"{dashboard.uid}.json").write_text(to_json(dashboard))


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER)
