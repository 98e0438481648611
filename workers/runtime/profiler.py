"""JAX's profiler around a number of steps, on demand."""

from __future__ import annotations

import dataclasses
import pathlib
import subprocess
import sys
import tempfile
import threading
import time

import jax
from jax._src.lib import _profiler

# What ends a trace frees its events while it holds the interpreter, about 5 ms for each MB: so many steps keep that short.
SPAN = 50
EXPORT_SECONDS = 60.0

# Writes traces as XProf and Perfetto read them, in a process of its own: it would take seconds of this one's locks.
_EXPORT = """
import os, pathlib, shutil, sys
os.nice(10)
from jaxlib import _profiler
options = _profiler.ProfileOptions()
options.python_tracer_level = options.host_tracer_level = 0
session = _profiler.ProfilerSession(options)
root = pathlib.Path(sys.argv[1])
for part in sorted(root.glob("*.xspace")):
    session.export(part.read_bytes(), str(root / part.stem))
    (made,) = (root / part.stem / "plugins" / "profile").iterdir()
    target = root / "out" / "plugins" / "profile" / f"{made.name}_{part.stem}"
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.move(made, target)
"""


class ProfilerError(RuntimeError):
    """No trace could be taken."""


@dataclasses.dataclass(eq=False)
class _Span:
    """Steps that are being traced; `done` is set when all have begun and ended."""

    left: int
    done: threading.Event = dataclasses.field(default_factory=threading.Event)


class Profiler:
    """Traces steps of this process. `trace` is called by one thread, `step` by the one that computes, before each step.

    The thread that computes only counts: it never starts, stops or writes a trace.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._span: _Span | None = None

    def trace(self, steps: int, seconds: float) -> dict[str, bytes]:
        """The trace files of the next `steps` steps by their path within the profiler's folder. More than SPAN steps come as
        several traces, with a pause between them.

        Raises:
          ProfilerError: fewer steps came within `seconds`, another trace is being taken, or JAX takes none.
        """
        if not self._lock.acquire(blocking=False):
            raise ProfilerError("another trace is being taken")
        try:
            with tempfile.TemporaryDirectory(prefix="grokmesh-profile-", ignore_cleanup_errors=True) as folder:
                root, left, until = pathlib.Path(folder), steps, time.monotonic() + seconds
                for part in range(-(-steps // SPAN)):
                    span = _Span(min(SPAN, left))
                    left -= span.left
                    taken = self._take(span, until)
                    if not span.done.is_set():
                        missing = left + span.left
                        raise ProfilerError(f"{missing} of {steps} steps were to come after {seconds:.0f} s")
                    (root / f"{part:04}.xspace").write_bytes(taken)
                return _exported(root)
        finally:
            self._lock.release()

    def _take(self, span: _Span, until: float) -> bytes:
        """What JAX records until a span is done, or its time is over."""
        options = jax.profiler.ProfileOptions()
        options.python_tracer_level = 0
        options.host_tracer_level = 1
        options.raise_error_on_start_failure = True
        try:
            session = _profiler.ProfilerSession(options)
            self._span = span
            span.done.wait(max(0.0, until - time.monotonic()))
            self._span = None
            taken: bytes = session.stop()
            return taken
        except Exception as error:
            raise ProfilerError(str(error)) from error
        finally:
            self._span = None

    def step(self) -> None:
        """Counts a step that begins, if a trace is being taken. Raises nothing."""
        span = self._span
        if span is not None:
            if span.left == 0:  # the last one has ended
                self._span = None
                span.done.set()
            else:
                span.left -= 1


def _exported(root: pathlib.Path) -> dict[str, bytes]:
    """The files that are made of what was recorded, by their path within the profiler's folder."""
    try:
        command = [sys.executable, "-P", "-c", _EXPORT, str(root)]
        subprocess.run(command, check=True, capture_output=True, timeout=EXPORT_SECONDS)
    except (OSError, subprocess.SubprocessError) as error:
        raise ProfilerError(f"the trace could not be written: {error}") from error
    out = root / "out"
    return {str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*") if path.is_file()}
