"""Calls of the OpenAI-compatible interface, without a client library."""

from __future__ import annotations

import contextlib
import http.client
import json
from typing import Any


def call(address: str, path: str, body: object = None, **headers: str) -> tuple[int, dict[str, str], Any]:
    """Status, headers and body; of a stream the objects of its events, or the error that it ends with instead of [DONE]."""
    with contextlib.closing(http.client.HTTPConnection(address, timeout=60)) as connection:
        data = None if body is None else body if isinstance(body, bytes) else json.dumps(body)
        sent = {name.replace("_", "-"): value for name, value in headers.items()}
        connection.request("GET" if data is None else "POST", path, data, {"content-type": "application/json", **sent})
        answer = connection.getresponse()
        content, found = answer.read(), {name.lower(): value for name, value in answer.getheaders()}
    if found.get("content-type", "").startswith("text/event-stream"):
        *events, end = content.decode().removesuffix("\n\n").split("\n\n")
        if end == "data: [DONE]":
            return answer.status, found, [json.loads(event.partition("data: ")[2]) for event in events]
        return answer.status, found, json.loads(end.removeprefix("data: "))
    return answer.status, found, json.loads(content) if content else None
