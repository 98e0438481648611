"""An HTTP server that costs a worker next to nothing, however many connect and whatever they send."""

from __future__ import annotations

import contextlib
import socket
import socketserver
import threading
from typing import Any
from wsgiref.simple_server import WSGIServer


class BoundedServer(socketserver.ThreadingMixIn, WSGIServer):
    """Answers a bounded number of connections, each in a thread of its own and for a bounded time."""

    #: Connections that are answered at once; more are closed. Each has two threads.
    connections = 8
    #: Seconds that a connection may last.
    seconds = 5.0

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, address: tuple[str, int], *others: Any) -> None:
        self.address_family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        self._places = threading.BoundedSemaphore(self.connections)
        super().__init__(address, *others)

    def serve_in_background(self, name: str) -> None:
        """Serves in a thread of this name until the process ends."""
        threading.Thread(target=self.serve_forever, daemon=True, name=name).start()

    def process_request(self, request: Any, client_address: Any) -> None:
        """Answers in a thread of its own, if there is a place."""
        if not self._places.acquire(blocking=False):
            self.shutdown_request(request)
            return
        try:
            super().process_request(request, client_address)
        except RuntimeError:  # no more threads
            self._places.release()
            raise

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Answers, within `seconds`: a socket's timeout would begin anew with each byte."""
        timer = threading.Timer(self.seconds, _end, (request,))
        timer.daemon = True
        try:
            timer.start()
            super().process_request_thread(request, client_address)
        finally:
            timer.cancel()
            self._places.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """What a stranger's connection ends with is not worth a line."""


def _end(connection: socket.socket) -> None:
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)
