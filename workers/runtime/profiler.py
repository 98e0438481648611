"""JAX's profiler around a number of steps, on demand."""

from __future__ import annotations

import contextlib
import dataclasses
import pathlib
import queue
import shutil
import tempfile
import threading

import jax


class ProfilerError(RuntimeError):
    """No trace could be taken."""


@dataclasses.dataclass(eq=False)
class _Trace:
    """A trace that is wanted or under way; `done` gets what went wrong, or None."""

    folder: str
    left: int
    done: queue.SimpleQueue[Exception | None] = dataclasses.field(default_factory=queue.SimpleQueue)


class Profiler:
    """Traces steps of this process. `trace` is called by one thread, `step` by the one that computes, before each step."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._wanted: _Trace | None = None
        self._running: _Trace | None = None

    def trace(self, steps: int, seconds: float) -> dict[str, bytes]:
        """The trace files of the next `steps` steps by their path within the profiler's folder.

        Raises:
          ProfilerError: fewer steps came within `seconds`, another trace is being taken, or JAX takes none.
        """
        if not self._lock.acquire(blocking=False):
            raise ProfilerError("another trace is being taken")
        try:
            with tempfile.TemporaryDirectory(prefix="grokmesh-profile-", ignore_cleanup_errors=True) as folder:
                self._wanted = trace = _Trace(folder, steps)
                try:
                    error = trace.done.get(timeout=seconds)
                except queue.Empty:
                    raise ProfilerError(f"{trace.left} of {steps} steps were to come after {seconds:.0f} s") from None
                finally:
                    self._wanted = None
                if error is not None:
                    raise ProfilerError(str(error)) from error
                root = pathlib.Path(folder)
                return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}
        finally:
            self._lock.release()

    def step(self) -> None:
        """Begins or ends a trace between two steps, if there is one to. Raises nothing: serving goes on without it."""
        wanted, running = self._wanted, self._running
        if running is not None:
            running.left -= 1
            if running.left > 0 and running is wanted:
                return
            self._running = None
            error: Exception | None = None
            try:
                jax.profiler.stop_trace()
            except Exception as raised:
                error = raised
            running.done.put(error)
            if running is not wanted:  # nobody waits for it any more
                with contextlib.suppress(OSError):
                    shutil.rmtree(running.folder)
        elif wanted is not None and wanted.left > 0:
            try:
                jax.profiler.start_trace(wanted.folder)
                self._running = wanted
            except Exception as raised:
                wanted.left = 0
                wanted.done.put(raised)
