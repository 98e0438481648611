"""Several gateways for a client, each with a mesh of its own: who serves does not matter."""

from __future__ import annotations

import pathlib
import signal
from typing import Any

from grokmesh import Client
from tests.support.service import running


def test_a_stream_goes_on_at_another_gateway_when_its_own_is_stopped(tmp_path: pathlib.Path) -> None:
    mesh = {"hosts": 1, "devices_per_host": 1, "data": 1, "model": 1}
    folders = [tmp_path / name for name in ("one", "other")]
    for folder in folders:
        folder.mkdir()
    ports = [f"127.0.0.1:{port}" for port in (50151, 50152)]
    sections: list[dict[str, Any]] = [
        {"mesh": mesh, "gateway": {"address": port, "drain_seconds": 0.3}} for port in ports
    ]
    options: dict[str, Any] = {"max_tokens": 450, "ignore_eos": True, "temperature": 1.0, "seed": 5}
    with running(folders[0], **sections[0]) as one, running(folders[1], **sections[1]) as other:
        with Client(other.address) as client:
            whole = client.complete("In the beginning", **options)
        with Client(f"ipv4:{','.join(ports)}") as client:
            stream = client.generate("In the beginning", **options)
            parts = [next(stream)]
            one.process.send_signal(signal.SIGTERM)
            parts += stream
            assert one.process.wait(timeout=60) == 0
        assert "".join(part.text for part in parts) == whole.text
        assert tuple(token for part in parts for token in part.tokens) == whole.tokens
        assert parts[-1].finish_reason == "length"
