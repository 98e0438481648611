"""Waiting for what takes an unknown time."""

from __future__ import annotations

import time
from collections.abc import Callable


def wait_until(
    reached: Callable[[], bool], seconds: float, what: Callable[[], object] = lambda: "", pause: float = 0.1
) -> None:
    """Returns once `reached` is true, asked every `pause` seconds; fails after `seconds`, and tells `what`."""
    deadline = time.monotonic() + seconds
    while not reached():
        assert time.monotonic() < deadline, f"not reached within {seconds:.0f} s: {what()}"
        time.sleep(pause)
