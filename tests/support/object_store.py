"""An S3-compatible server with a checkpoint in it."""

from __future__ import annotations

import contextlib
import pathlib
import urllib.request
from collections.abc import Iterator

import obstore.store
import pytest
from moto.server import ThreadedMotoServer

#: Of the checkpoint, for whoever has the environment.
URL = "s3://models/grok"


@contextlib.contextmanager
def object_store(checkpoint: pathlib.Path, listen: str = "127.0.0.1") -> Iterator[dict[str, str]]:
    """The environment in which URL is a copy of the checkpoint, which is also that of this process while the block runs."""
    server = ThreadedMotoServer(listen, port=0)
    server.start()
    _, port = server.get_host_and_port()
    endpoint = f"http://127.0.0.1:{port}"
    environment = {
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": endpoint,
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        urllib.request.urlopen(urllib.request.Request(f"{endpoint}/models", method="PUT"))
        store = obstore.store.from_url("s3://models", client_options={"allow_http": True})
        for path in checkpoint.rglob("*"):
            if path.is_file():
                obstore.put(store, f"grok/{path.relative_to(checkpoint)}", path.read_bytes())
        yield environment
    server.stop()
