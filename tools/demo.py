"""`make demo`: the demo model on a local cluster of two hosts, one streamed completion, and a clean end."""

from __future__ import annotations

import pathlib
import sys
import tempfile
import time

import yaml

from cluster import daemon
from cluster.commands.status import format_status
from grokmesh import Client
from workers.host.streams import free_port

PROMPT = "In the beginning God created the heaven and the earth. And the"
MAX_TOKENS = 96
START_SECONDS = 300.0


def main() -> int:
    """Exit code 0 if the completion came and the service ended cleanly."""
    with tempfile.TemporaryDirectory(prefix="grokmesh-demo-") as folder:
        path, address = _configuration(pathlib.Path("ray_config.yaml"), pathlib.Path(folder))
        log = pathlib.Path(folder) / "serve.log"
        began = time.monotonic()
        process = daemon.launch(path, log, detached=False)
        try:
            daemon.follow(process, log, START_SECONDS)
            print(f"ready after {time.monotonic() - began:.0f} s\n")
            _show(address)
        except daemon.DaemonError as error:
            print(f"{error}\n{log.read_text()}", file=sys.stderr)
            return 1
        finally:
            process.terminate()
            code = process.wait()
        print(f"stopped after {time.monotonic() - began:.0f} s in all")
        return code


def _configuration(source: pathlib.Path, folder: pathlib.Path) -> tuple[pathlib.Path, str]:
    """The project's configuration on free ports, so that the demo disturbs no running service."""
    values = yaml.safe_load(source.read_text())
    address, http, metrics = (f"127.0.0.1:{free_port('127.0.0.1')}" for _ in range(3))
    values["model"]["checkpoint"] = str((source.parent / values["model"]["checkpoint"]).resolve())
    values["gateway"] |= {"address": address, "http_address": http}
    values["telemetry"]["address"] = metrics
    path = folder / source.name
    path.write_text(yaml.safe_dump(values))
    return path, address


def _show(address: str) -> None:
    with Client(address) as client:
        model = client.model()
        print(f"{model.name}: {model.parameters:,} parameters, context {model.context_length}\n\n{PROMPT}", end="")
        began = time.monotonic()
        first, count = 0.0, 0
        for part in client.generate(PROMPT, max_tokens=MAX_TOKENS, temperature=0.7, top_p=0.9, seed=7):
            first = first or time.monotonic() - began
            count += len(part.tokens)
            print(part.text, end="", flush=True)
        rate = (count - 1) / (time.monotonic() - began - first)
        print(f"\n\n{count} tokens at {rate:.1f} tokens/s, first after {first * 1000:.0f} ms\n")
        print(format_status(client.status()))


if __name__ == "__main__":
    sys.exit(main())
