"""gRPC from Node.js, by the .proto files alone and by reflection alone; and `curl -N`."""

from __future__ import annotations

import os
import pathlib
import shutil
import subprocess

import pytest

URL, ADDRESS = os.environ["GROKMESH_HTTP"], os.environ["GROKMESH_GRPC"]
NODE = pathlib.Path("build/clients/node")


@pytest.mark.skipif(not (NODE / "node_modules").exists(), reason="needs Node.js and npm")
def test_node_needs_the_proto_files_only_or_reflection():
    command = ["node", NODE / "client.mjs", ADDRESS, "proto"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "the same by .proto files and by reflection\n"


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
def test_curl_gets_a_stream():
    body = '{"model": "demo", "prompt": "In the beginning", "max_tokens": 5, "ignore_eos": true, "stream": true}'
    command = ["curl", "-sN", f"{URL}/v1/completions", "-H", "content-type: application/json", "-d", body]
    events = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout.split("\n\n")
    assert all(event.startswith("data: {") for event in events[:-2])
    assert events[-2:] == ["data: [DONE]", ""]
