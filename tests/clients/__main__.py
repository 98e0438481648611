"""Starts the demo on two hosts, with a chat template, and runs the clients' tests in an environment of their own.

python -m tests.clients
"""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys
import tempfile

from tests.conftest import DEMO
from tests.support.ports import free_port
from tests.support.service import running

PYTHON = pathlib.Path("build/clients/bin/python")
TEMPLATE = """{% for message in messages %}{{ message.role | capitalize }}: {{ message.content }}
{% endfor %}{% for tool in tools or [] %}Tool: {{ tool | tojson }}
{% endfor %}Assistant:"""


def main() -> int:
    address = f"127.0.0.1:{free_port('127.0.0.1')}"
    mesh = {"hosts": 2, "devices_per_host": 2, "data": 2, "model": 2}
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        model = folder / "model"
        model.mkdir()
        for file in DEMO.iterdir():
            (model / file.name).symlink_to(file)
        (model / "chat_template.jinja").write_text(TEMPLATE)
        served = {"name": "demo", "checkpoint": str(model)}
        with running(folder, mesh=mesh, model=served, gateway={"http_address": address}) as service:
            command = [
                str(PYTHON),
                "-m",
                "pytest",
                "-q",
                "-p",
                "no:cacheprovider",
                "--noconftest",
                "-c",
                os.devnull,
                *sys.argv[1:],
            ]
            tests = map(str, sorted(pathlib.Path(__file__).parent.glob("*_client.py")))
            environment = {**os.environ, "GROKMESH_HTTP": f"http://{address}", "GROKMESH_GRPC": service.address}
            environment["OPENAI_API_KEY"] = "none"
            return subprocess.run([*command, *tests], env=environment, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
