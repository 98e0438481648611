"""The leader's grammars, each followed by a process of its own: what the leader holds of them, and what the processes do.

Messages to a process: first JSON, `{"grammar", "allowed", "resumed"}`, then each token as four bytes. Its answer to each: a
mask, or an empty message and after it what is wrong.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import json
import selectors
import sys
import threading
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

from workers.checkpoint.storage import locate
from workers.messages.request import Request
from workers.text.grammar import GrammarError, Grammars
from workers.text.sandbox import Budget, JobStream, Sandbox, SandboxError, hang_up, run_template
from workers.text.tokenizer import Tokenizer

#: What following a grammar may take that has been tried on the gateway in less, and what more for each token that is resumed.
BUDGET, RESUMED_SECONDS = Budget(seconds=4.0, mebibytes=256), 0.005


class RemoteConstraint:
    """An `engine.request.Constraint` whose grammar another process follows. `accept`, `mask` and `close` are the leader's."""

    def __init__(self, request: Request, asked: set[RemoteConstraint]) -> None:
        self.request = request
        self._asked = asked
        self._stream: Connection | None = None
        # No thread may write to a stream that another one closes.
        self._lock = threading.Lock()
        self._due = 1
        self._mask = b""
        self.closed = False
        self.problem = ""
        #: Whether the problem is not the grammar's, and the request may be sent again.
        self.passing = False

    @property
    def ready(self) -> bool:
        return self._due == 0 or bool(self.problem)

    def mask(self) -> bytes:
        return self._mask

    def accept(self, token: int) -> None:
        self._due += 1
        self._asked.add(self)
        self._send(token.to_bytes(4, "little"))

    def close(self) -> None:
        with self._lock:
            self.closed = True
            if self._stream is not None:
                hang_up(self._stream)

    def begin(self, stream: Connection) -> None:
        """Gives it a process."""
        request = self.request
        first = {"grammar": request.grammar, "allowed": request.sampling.allowed_tokens, "resumed": request.resumed}
        self._stream = stream
        self._send(json.dumps(first).encode())
        if self.closed:  # meanwhile
            self.close()

    def read(self, stream: Connection) -> bool:
        """Takes an answer. False if no more will come."""
        try:
            answer = stream.recv_bytes()
            if answer:
                self._mask = answer
                self._due -= 1
                return True
            self.problem = stream.recv_bytes().decode()
        except (EOFError, OSError):
            self.problem = f"it takes more than {BUDGET} to follow"
        return False

    def end(self, stream: Connection) -> None:
        """Closes the stream of a process that has ended."""
        with self._lock:
            self._stream = None
            stream.close()

    def _send(self, message: bytes) -> None:
        # That a process has ended is noticed where its answers are awaited.
        with self._lock, contextlib.suppress(OSError):
            if self._stream is not None:
                self._stream.send_bytes(message)


class Constraints:
    """Gives constraints their processes, `most` at a time, and reads their answers. `on_answer` is called by another thread.

    Of those that wait for a process, the first of the highest priority comes next whose owner has the fewest.
    """

    def __init__(self, sandbox: Sandbox, most: int, on_answer: Callable[[], None]) -> None:
        self._sandbox = sandbox
        self._on_answer = on_answer
        self._places = threading.Semaphore(most)
        self._waiting: list[RemoteConstraint] = []
        self._more = threading.Condition()
        self._owned: collections.Counter[str] = collections.Counter()
        self._selector = selectors.DefaultSelector()
        self._answered = threading.Condition()
        self._asked: set[RemoteConstraint] = set()
        for work in (self._begin, self._hear):
            threading.Thread(target=work, daemon=True, name=f"grammars-{work.__name__}").start()

    def open(self, request: Request) -> RemoteConstraint:
        """The constraint of a request, which is not ready yet."""
        constraint = RemoteConstraint(request, self._asked)
        with self._more:
            self._waiting.append(constraint)
            self._more.notify()
        return constraint

    def settle(self, seconds: float) -> None:
        """Waits, at most so long, for the masks after tokens that came since this was last called."""
        if self._asked:
            with self._answered:
                self._answered.wait_for(lambda: all(constraint.ready for constraint in self._asked), seconds)
            self._asked.clear()

    def _next(self) -> RemoteConstraint:
        """The constraint that gets the next process."""

        def claim(constraint: RemoteConstraint) -> tuple[int, int]:
            return -constraint.request.priority, self._owned[constraint.request.owner]

        with self._more:
            while True:
                self._more.wait_for(lambda: bool(self._waiting))
                constraint = min(self._waiting, key=claim)
                self._waiting.remove(constraint)
                if not constraint.closed:
                    self._owned[constraint.request.owner] += 1
                    return constraint

    def _begin(self) -> None:
        while True:
            self._places.acquire()
            constraint = self._next()
            resumed = len(constraint.request.resumed)
            try:
                stream = self._sandbox.job(
                    dataclasses.replace(BUDGET, seconds=BUDGET.seconds + RESUMED_SECONDS * resumed)
                )
            except SandboxError as error:
                constraint.passing, constraint.problem = True, str(error)
                self._release(constraint)
                self._tell()
                continue
            # Before anything is sent: its end is noticed from now on.
            self._selector.register(stream, selectors.EVENT_READ, constraint)
            constraint.begin(stream)

    def _hear(self) -> None:
        while True:
            for key, _ in self._selector.select():
                stream: Any = key.fileobj
                constraint: RemoteConstraint = key.data
                if not constraint.read(stream):
                    self._selector.unregister(stream)
                    constraint.end(stream)
                    self._release(constraint)
            self._tell()

    def _release(self, constraint: RemoteConstraint) -> None:
        with self._more:
            self._owned[constraint.request.owner] -= 1
        self._places.release()

    def _tell(self) -> None:
        with self._answered:
            self._answered.notify_all()
        self._on_answer()


def main() -> None:
    """The template of the processes that follow grammars."""
    control, checkpoint, vocab_size, eos_token = sys.argv[1:]
    grammars = Grammars(Tokenizer(locate(checkpoint) / "tokenizer.model"), int(vocab_size), int(eos_token))
    run_template(int(control), lambda stream: _follow(grammars, stream))


def _follow(grammars: Grammars, stream: JobStream) -> None:
    first = json.loads(stream.receive())
    try:
        matcher = grammars.matcher(first["grammar"], first["allowed"])
        for token in first["resumed"]:
            matcher.accept(token)
        while True:
            stream.send(matcher.mask())
            matcher.accept(int.from_bytes(stream.receive(), "little"))
    except (GrammarError, MemoryError) as error:
        stream.send(b"")
        stream.send(str(error).encode() or b"it takes too much memory")


if __name__ == "__main__":
    main()
