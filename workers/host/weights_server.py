"""Serves this host's weights cache to hosts that are to hold the same; see `checkpoint.twin`."""

from __future__ import annotations

import hmac
import os
import pathlib
import re
import secrets
from http.server import BaseHTTPRequestHandler
from typing import BinaryIO

from workers.messages.specs import WeightsAddress
from workers.telemetry.bounded_server import BoundedServer

#: Of files in the cache; nothing else can be asked for.
_PATH = re.compile(r"/([0-9a-f]{24}/[0-9a-f]{24}/[\w~-][\w.~-]*)", re.ASCII)
_RANGE = re.compile(r"bytes=(\d{1,15})-(\d{1,15})", re.ASCII)


class WeightsServer(BoundedServer):
    """Answers GET of a file, or of a range of its bytes, to those that know this process's secret."""

    connections = 64
    seconds = 600.0

    def __init__(self, host: str, directory: pathlib.Path) -> None:
        """Listens on a free port of `host`."""
        super().__init__((host, 0), _Handler)
        self.directory = directory
        self.secret = secrets.token_hex(16)

    @property
    def address_for_twins(self) -> WeightsAddress:
        """For the hosts that may read here."""
        return WeightsAddress(self.server_address[0], self.server_port, self.secret)  # type: ignore[arg-type]


class _Handler(BaseHTTPRequestHandler):
    #: Seconds that the other side may keep a connection waiting.
    timeout = 10.0
    server: WeightsServer

    def do_GET(self) -> None:
        given = self.headers.get("Authorization", "").encode()
        if not hmac.compare_digest(given, f"Bearer {self.server.secret}".encode()):
            self.send_error(401)
            return
        name = _PATH.fullmatch(self.path)
        try:
            if name is None:
                raise FileNotFoundError(self.path)
            with (self.server.directory / name[1]).open("rb") as file:
                self._send(file)
        except FileNotFoundError:
            self.send_error(404)

    def _send(self, file: BinaryIO) -> None:
        size = os.fstat(file.fileno()).st_size
        asked = _RANGE.fullmatch(self.headers.get("Range", f"bytes=0-{size - 1}"))
        start, stop = (int(asked[1]), int(asked[2]) + 1) if asked else (0, 0)
        if not start < stop <= size:
            self.send_error(416)
            return
        self.send_response(206 if "Range" in self.headers else 200)
        self.send_header("Content-Length", str(stop - start))
        if "Range" in self.headers:
            self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{size}")
        self.end_headers()
        self.connection.sendfile(file, start, stop - start)

    def log_message(self, format: str, *args: object) -> None:
        """Says nothing of each request."""
