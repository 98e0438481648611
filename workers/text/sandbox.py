"""Work of unknown cost in processes of its own, which end when it takes too much.

A template process has everything loaded. For each job it forks a child, which gets one end of a stream, a limit of memory
and one of processor time, and nothing else that matters: whatever a job does, only the job ends.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import pathlib
import resource
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection

_MIB = 1024 * 1024


@dataclasses.dataclass(frozen=True)
class Budget:
    """What a job may take.

    Attributes:
      seconds: of a processor, for each answer.
      total_seconds: of a processor, in all.
      mebibytes: of memory beyond what the template has.
      niceness: how far it yields the processors to what serves.
    """

    seconds: float
    total_seconds: int = 60
    mebibytes: int = 512
    niceness: int = 5

    def __str__(self) -> str:
        return f"{self.seconds:g} s of a processor or {self.mebibytes} MiB of memory"


class SandboxError(Exception):
    """No job can be started."""


class Sandbox:
    """Starts jobs. Any thread may call it. The template ends with the process that made it, however that ends."""

    def __init__(self, module: str, arguments: Sequence[str]) -> None:
        """Starts the template: `python -m module DESCRIPTOR arguments`, which calls `run_template`."""
        self._command = (module, *arguments)
        self._lock = threading.Lock()
        self._control: socket.socket | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._closed = False
        with self._lock:
            self._start()

    def job(self, budget: Budget) -> Connection:
        """A stream to a new child. It ends without an answer when the child has taken more than its budget. Raises
        SandboxError."""
        order = " ".join(map(str, dataclasses.astuple(budget))).encode()
        try:
            ours, theirs = socket.socketpair()
            with theirs, contextlib.ExitStack() as stack:
                stack.callback(ours.close)
                with self._lock:
                    self._order(order, theirs.fileno())
                stack.pop_all()
        except OSError as error:  # no more descriptors, processes or memory
            raise SandboxError(f"no process can be started: {error}") from error
        return Connection(ours.detach())

    def close(self) -> None:
        """Ends the template. Jobs end with their streams."""
        with self._lock:
            self._closed = True
            self._end()

    def _order(self, order: bytes, stream: int) -> None:
        for _ in range(2):
            try:
                assert self._control is not None
                socket.send_fds(self._control, [order], [stream])
                return
            except OSError:  # the template has died
                self._start()
        raise SandboxError(f"{self._command[0]} does not start; see the log")

    def _start(self) -> None:
        self._end()
        if self._closed:
            raise SandboxError("the sandbox is closed")
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            module, *arguments = self._command
            # Not the current folder: a module there must not take the place of ours.
            command = [sys.executable, "-P", "-m", module, str(theirs.fileno()), *arguments]
            self._process = subprocess.Popen(command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL)

    def _end(self) -> None:
        if self._control is not None:
            self._control.close()
        if self._process is not None:
            self._process.kill()
            self._process.wait()


def hang_up(stream: Connection) -> None:
    """Closes the input of a child: it ends once it has answered, and so does its stream."""
    with contextlib.suppress(OSError), socket.socket(fileno=os.dup(stream.fileno())) as end:
        end.shutdown(socket.SHUT_WR)


class JobStream:
    """A child's end of its stream. For each answer it may compute only so long after what it received."""

    def __init__(self, stream: Connection, seconds: float) -> None:
        self._stream = stream
        self._seconds = seconds

    def receive(self) -> bytes:
        """The next message. Raises EOFError when the other end is closed."""
        signal.setitimer(signal.ITIMER_PROF, 0)  # whose signal, unhandled, ends the process
        received = self._stream.recv_bytes()
        signal.setitimer(signal.ITIMER_PROF, self._seconds)
        return received

    def send(self, answer: bytes) -> None:
        self._stream.send_bytes(answer)


def run_template(control: int, work: Callable[[JobStream], None]) -> None:
    """The template's life: forks a child that does `work` for each stream that comes, until none can come any more."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # children are not waited for
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's; the parent decides
    with socket.socket(fileno=control) as orders:
        while True:
            order, descriptors, _, _ = socket.recv_fds(orders, 64, 1)
            if not order:
                return
            (stream,) = descriptors
            if os.fork():
                os.close(stream)
                continue
            seconds, *others = order.decode().split()
            orders.close()
            _work(work, Connection(stream), Budget(float(seconds), *map(int, others)))


def _work(work: Callable[[JobStream], None], stream: Connection, budget: Budget) -> None:
    """The child's life, in which signals' own effects are the limits: they hold whatever code runs."""
    with contextlib.suppress(BaseException):
        os.nice(budget.niceness)
        # What Python prints when memory ends helps no reader.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_CPU, (budget.total_seconds, budget.total_seconds))
        most = _address_space() + budget.mebibytes * _MIB
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
        work(JobStream(stream, budget.seconds))
    os._exit(0)


def _address_space() -> int:
    return int(pathlib.Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
