"""What holds a loop up is named."""

from __future__ import annotations

import time

from tests.support.waiting import wait_until
from workers.telemetry.stalls import StallWatch


def _hold(seconds: float) -> None:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        pass


def test_a_turn_that_takes_too_long_is_told_with_what_ran() -> None:
    told: list[str] = []
    watch = StallWatch("the loop", 0.02, told.append)
    watch.turn()
    _hold(0.2)
    watch.turn()
    wait_until(lambda: bool(told), 5, pause=0.01)
    assert "the loop stood still for" in told[0]
    assert "_hold (" in told[0]


def test_waiting_for_others_is_no_stall_and_without_a_limit_nothing_is_watched() -> None:
    told: list[str] = []
    for watch in (StallWatch("the loop", 0.02, told.append), StallWatch("another", None, told.append)):
        watch.turn()
        with watch.resting():
            time.sleep(0.1)
        with watch.resting():  # what is behind is forgotten
            time.sleep(0.05)
    assert not told
