"""Writes the dashboards as Grafana's JSON: python -m deploy.grafana.build [DIR]"""

from __future__ import annotations

import pathlib
import sys

from deploy.grafana.engine import ENGINE
from deploy.grafana.experts import EXPERTS
from deploy.grafana.gateway import GATEWAY
from deploy.grafana.mesh import MESH
from deploy.grafana.panels import to_json
from deploy.grafana.service import SERVICE

DASHBOARDS = (SERVICE, ENGINE, EXPERTS, MESH, GATEWAY)
FOLDER = pathlib.Path(__file__).parent / "dashboards"


def main(folder: pathlib.Path) -> None:
    """Writes a file a dashboard, named by its uid."""
    for dashboard in DASHBOARDS:
        (folder / f"{dashboard.uid}.json").write_text(to_json(dashboard))


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER)
