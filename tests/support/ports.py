"""Ports for tests: none of those that the system gives to whoever asks, which Ray's many processes do all the time."""

from __future__ import annotations

import random
import socket

#: Below what Linux gives by itself, above what Ray gives its workers.
_PORTS = range(20_000, 32_000)


def free_port(address: str) -> int:
    """A port of `address` that no process listens on, and that none is given by chance soon after."""
    while True:
        port = random.SystemRandom().choice(_PORTS)
        with socket.socket() as probe:
            try:
                probe.bind((address, port))
            except OSError:
                continue
            return port
