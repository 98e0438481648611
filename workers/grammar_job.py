"""The leader's grammars, each followed by a process of its own: what the leader holds of them, and what the processes do.

Messages to a process: first JSON, `{"grammar", "allowed", "resumed"}`, then each token as four bytes. Its answer to each: a
mask, or an empty message and after it what is wrong.
"""

from __future__ import annotations

import contextlib
import json
import queue
import selectors
import sys
import threading
from collections.abc import Callable
from multiprocessing.connection import Connection

from workers.checkpoint.storage import locate
from workers.engine.request import Request
from workers.grammar import GrammarError, Grammars
from workers.sandbox import Budget, JobStream, Sandbox, SandboxError, hang_up, run_template
from workers.tokenizer import Tokenizer

#: A grammar that reaches a leader has been tried in less on the gateway.
BUDGET = Budget(seconds=4.0)


class RemoteConstraint:
    """An `engine.request.Constraint` whose grammar another process follows. `accept`, `mask` and `close` are the leader's."""

    def __init__(self, request: Request, asked: set[RemoteConstraint]) -> None:
        self._asked = asked
        self._first = json.dumps(
            {"grammar": request.grammar, "allowed": request.sampling.allowed_tokens, "resumed": request.resumed}
        ).encode()
        self._stream: Connection | None = None
        self._due = 1
        self._mask = b""
        self.closed = False
        self.problem = ""

    @property
    def ready(self) -> bool:
        """See `Constraint.ready`."""
        return self._due == 0 or bool(self.problem)

    def mask(self) -> bytes:
        """See `Constraint.mask`."""
        return self._mask

    def accept(self, token: int) -> None:
        """See `Constraint.accept`."""
        self._due += 1
        self._asked.add(self)
        assert self._stream is not None
        with contextlib.suppress(OSError):  # it has ended, which is noticed where answers are awaited
            self._stream.send_bytes(token.to_bytes(4, "little"))

    def close(self) -> None:
        """See `Constraint.close`."""
        self.closed = True
        if self._stream is not None:
            hang_up(self._stream)

    def begin(self, stream: Connection) -> None:
        """Gives it a process."""
        self._stream = stream
        stream.send_bytes(self._first)
        if self.closed:  # meanwhile
            hang_up(stream)

    def hear(self, stream: Connection) -> bool:
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


class Constraints:
    """Gives constraints their processes, `most` at a time, and hears these. `on_answer` is called by another thread."""

    def __init__(self, sandbox: Sandbox, most: int, on_answer: Callable[[], None]) -> None:
        self._sandbox = sandbox
        self._on_answer = on_answer
        self._places = threading.Semaphore(most)
        self._waiting: queue.SimpleQueue[RemoteConstraint] = queue.SimpleQueue()
        self._selector = selectors.DefaultSelector()
        self._answered = threading.Condition()
        self._asked: set[RemoteConstraint] = set()
        for work in (self._begin, self._hear):
            threading.Thread(target=work, daemon=True, name=f"grammars-{work.__name__}").start()

    def open(self, request: Request) -> RemoteConstraint:
        """The constraint of a request, which is not ready yet."""
        constraint = RemoteConstraint(request, self._asked)
        self._waiting.put(constraint)
        return constraint

    def settle(self, seconds: float) -> None:
        """Waits, at most so long, for the masks after tokens that came since this was last called."""
        if self._asked:
            with self._answered:
                self._answered.wait_for(lambda: all(constraint.ready for constraint in self._asked), seconds)
            self._asked.clear()

    def _begin(self) -> None:
        while True:
            constraint = self._waiting.get()
            self._places.acquire()
            if constraint.closed:
                self._places.release()
                continue
            try:
                stream = self._sandbox.job(BUDGET)
                self._selector.register(stream, selectors.EVENT_READ, constraint)
                constraint.begin(stream)
            except OSError:  # it has ended already, which is heard
                continue
            except SandboxError as error:
                constraint.problem = str(error)
                self._places.release()
                self._tell()

    def _hear(self) -> None:
        while True:
            for key, _ in self._selector.select():
                stream: Connection = key.fileobj  # type: ignore[assignment]
                if not key.data.hear(stream):
                    self._selector.unregister(stream)
                    stream.close()
                    self._places.release()
            self._tell()

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
