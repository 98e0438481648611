"""JAX's profiler around a number of steps, on demand."""

from __future__ import annotations

import pathlib
import queue
import tempfile
import threading

import jax


class ProfilerError(RuntimeError):
    """No trace could be taken."""


class Profiler:
    """Traces steps of this process. `trace` is called by one thread, `step` by the one that computes, before each step."""

    def __init__(self) -> None:
        self._wanted = 0
        self._left = 0
        self._lock = threading.Lock()
        self._done: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._folder = ""

    def trace(self, steps: int, seconds: float) -> dict[str, bytes]:
        """The trace files of the next `steps` steps by their path within the profiler's folder.

        Raises:
          ProfilerError: fewer steps came within `seconds`, or another trace is being taken.
        """
        if not self._lock.acquire(blocking=False):
            raise ProfilerError("another trace is being taken")
        try:
            with tempfile.TemporaryDirectory(prefix="grokmesh-profile-") as folder:
                self._folder, self._wanted = folder, steps
                try:
                    self._done.get(timeout=seconds)
                except queue.Empty:
                    missing = self._wanted or self._left
                    self._wanted, self._left = 0, min(self._left, 1)  # a trace under way ends with the next step
                    raise ProfilerError(
                        f"{missing} of {steps} steps were still to come after {seconds:.0f} s"
                    ) from None
                root = pathlib.Path(folder)
                return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}
        finally:
            self._lock.release()

    def step(self) -> None:
        """Begins or ends a trace between two steps, if one is wanted."""
        if self._wanted:
            self._left, self._wanted = self._wanted, 0
            jax.profiler.start_trace(self._folder)
        elif self._left:
            self._left -= 1
            if not self._left:
                jax.profiler.stop_trace()
                self._done.put(None)
