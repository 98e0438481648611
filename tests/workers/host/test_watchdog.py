"""Steps that take too long, by what steps of their kind take."""

from __future__ import annotations

import threading
import time

import pytest

from tests.support.waiting import wait_until
from workers.host.watchdog import ENOUGH, UNKNOWN_SECONDS, Watchdog
from workers.messages.plan import Chunk, DecodeRow, Plan


def _plan(prompt: int) -> Plan:
    return Plan(1, (), ((Chunk(0, 0, (3,) * prompt, True),),) if prompt else (), (DecodeRow(0, 1),))


def _seen(watchdog: Watchdog, plan: Plan, seconds: float) -> None:
    for _ in range(ENOUGH):
        watchdog.dispatched(plan)
        with watchdog.waiting(plan):
            time.sleep(seconds)
        watchdog.done(plan)


def test_a_step_is_judged_by_those_of_its_kind() -> None:
    watchdog = Watchdog(pytest.fail)
    decode, prompt = _plan(0), _plan(100)
    _seen(watchdog, decode, 0.01)
    assert 1.03 <= watchdog.limit(decode) < 1.5
    assert watchdog.limit(prompt) == UNKNOWN_SECONDS
    _seen(watchdog, prompt, 0.05)
    assert 1.15 <= watchdog.limit(_plan(127)) < 1.6
    assert watchdog.limit(_plan(128)) == UNKNOWN_SECONDS


def test_a_step_that_never_ends_is_told_once() -> None:
    told: list[str] = []
    barked = threading.Event()

    def bark(reason: str) -> None:
        told.append(reason)
        barked.set()

    watchdog = Watchdog(bark)
    plan = _plan(0)
    _seen(watchdog, plan, 0.001)
    watchdog.dispatched(plan)
    time.sleep(1.2)  # that the leader itself is busy says nothing of the devices
    assert not told
    with watchdog.waiting(plan):
        assert barked.wait(2.0)
        time.sleep(0.2)
    assert len(told) == 1
    assert "plan 1 has been running for" in told[0]


def test_a_step_that_is_slow_is_none_that_hangs() -> None:
    told: list[str] = []
    working = threading.Event()
    working.set()
    watchdog = Watchdog(told.append, working.is_set)
    plan = _plan(0)
    _seen(watchdog, plan, 0.001)
    watchdog.dispatched(plan)
    with watchdog.waiting(plan):
        time.sleep(watchdog.limit(plan) + 0.5)
        assert not told
        working.clear()
        wait_until(lambda: bool(told), 5)
