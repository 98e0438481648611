"""Whether a worker that is silent still lives: a second path to it.

Beside each worker runs a small process that reports how the worker's process fares. So a worker whose host is busy, or that
waits for a slow disk, is told from one that hangs, is stopped or has ended, and from a host that can't be reached.
"""

from __future__ import annotations

import dataclasses
import os
import socket
import subprocess
import sys
import time

from workers.host import liveness_server

#: Seconds in which a silent worker must show that it lives.
CONFIRM_SECONDS = 2.0
#: A worker that has been silent for so long is lost, whatever its process does.
MOST_SILENT_SECONDS = 30.0
_PAUSE_SECONDS = 0.1
#: Of threads: one has a processor or waits for one, or for a disk; one is stopped or has ended.
_BUSY, _STOPPED = frozenset("RD"), frozenset("TtZX")


@dataclasses.dataclass(frozen=True)
class Signs:
    """Of life: the states of a process's threads, a letter each as in Linux, and the processor time that it has used."""

    states: str
    processor_seconds: float

    def lives(self, before: Signs) -> bool:
        """Whether the process works, or has worked since `before`."""
        return bool(_BUSY & set(self.states)) or self.processor_seconds > before.processor_seconds

    @property
    def stopped(self) -> bool:
        return set(self.states) <= _STOPPED


def start_server(host: str) -> str:
    """Starts the process that reports on this one, and ends with it. Where it listens, on a free port of the address `host`."""
    with socket.create_server((host, 0), backlog=64) as listener:
        command = [sys.executable, "-I", "-S", liveness_server.__file__, str(os.getpid()), str(listener.fileno())]
        # Its standard input ends when this process does. The object is kept, for with it the pipe would be closed.
        _SERVERS.append(subprocess.Popen(command, pass_fds=[listener.fileno()], stdin=subprocess.PIPE))
        return f"{host}:{listener.getsockname()[1]}"


_SERVERS: list[subprocess.Popen[bytes]] = []


def ask(address: str, seconds: float) -> Signs:
    """The signs of the process beside the one that listens at `address`. Raises OSError if none answers in time."""
    host, port = address.rsplit(":", 1)
    deadline = time.monotonic() + seconds
    with socket.create_connection((host.strip("[]"), int(port)), timeout=seconds) as connection:
        answer = b""
        while True:
            connection.settimeout(max(deadline - time.monotonic(), 0.001))
            part = connection.recv(65536)
            if not part:
                break
            answer += part
    states, _, used = answer.decode(errors="replace").partition(" ")
    try:
        return Signs(states, float(used))
    except ValueError as error:
        raise OSError(f"{address} does not report on a process") from error


def why_lost(address: str, silent: float, confirm: float = CONFIRM_SECONDS) -> str | None:
    """Why a silent worker is lost; None as soon as it turns out to live. Blocks for up to `confirm` seconds.

    Args:
      address: of the process beside the worker; with none, silence is enough.
      silent: seconds for which nothing has come from it.
      confirm: seconds for which its process may look dead, or its host be out of reach.
    """
    if not address or silent > MOST_SILENT_SECONDS:
        return f"it has been silent for {silent:.1f} s"
    deadline = time.monotonic() + confirm
    first: Signs | None = None
    while True:
        left = max(deadline - time.monotonic(), _PAUSE_SECONDS)
        try:
            found = ask(address, left)
            first = first or found
            if found.lives(first):
                return None
            reason = "its process is stopped" if found.stopped else "its process hangs"
        except ConnectionRefusedError:
            return "its process has ended"
        except OSError:
            reason = "its host can't be reached"
        if time.monotonic() >= deadline:
            return reason
        time.sleep(_PAUSE_SECONDS)
