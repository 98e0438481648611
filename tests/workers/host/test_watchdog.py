"""Steps that take too long, by what steps of their kind take."""

from __future__ import annotations

import pytest

from tests.support.waiting import wait_until
from workers.host.watchdog import CHECK_SECONDS, ENOUGH, UNKNOWN_SECONDS, Watchdog
from workers.messages.plan import Chunk, DecodeRow, Plan


class _Clock:
    """Seconds that pass when a test says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def _pass(watchdog: Watchdog, clock: _Clock, seconds: float) -> bool:
    """Lets time pass with checks in between, until one barks; whether one does."""
    for _ in range(round(seconds / CHECK_SECONDS)):
        clock.now += CHECK_SECONDS
        if watchdog.check():
            return True
    return False


def _plan(prompt: int) -> Plan:
    return Plan(1, (), ((Chunk(0, 0, (3,) * prompt, True),),) if prompt else (), (DecodeRow(0, 1),))


def _see(watchdog: Watchdog, clock: _Clock, plan: Plan, seconds: float) -> None:
    for _ in range(ENOUGH):
        watchdog.dispatched(plan)
        with watchdog.waiting(plan):
            clock.now += seconds
        watchdog.done(plan)


def test_a_step_is_judged_by_those_of_its_kind() -> None:
    clock = _Clock()
    watchdog = Watchdog(pytest.fail, clock=clock)
    decode, prompt = _plan(0), _plan(100)
    _see(watchdog, clock, decode, 0.01)
    assert watchdog.limit(decode) == pytest.approx(1.03)
    assert watchdog.limit(prompt) == UNKNOWN_SECONDS
    _see(watchdog, clock, prompt, 0.05)
    assert watchdog.limit(_plan(127)) == pytest.approx(1.15)
    assert watchdog.limit(_plan(128)) == UNKNOWN_SECONDS


def test_a_step_that_never_ends_is_reported() -> None:
    clock, reports = _Clock(), list[str]()
    watchdog, plan = Watchdog(reports.append, clock=clock), _plan(0)
    _see(watchdog, clock, plan, 0.01)
    watchdog.dispatched(plan)
    clock.now += 60  # that the leader itself is busy says nothing of the devices
    assert not watchdog.check()
    with watchdog.waiting(plan):
        assert not _pass(watchdog, clock, 1.0)
        assert _pass(watchdog, clock, 0.1)
    assert reports == ["plan 1 has been running for 1.0 s; a rank must hang"]


def test_of_the_time_in_which_the_leader_was_stopped_little_counts() -> None:
    clock = _Clock()
    watchdog, plan = Watchdog(lambda _: None, clock=clock), _plan(0)
    _see(watchdog, clock, plan, 0.01)
    watchdog.dispatched(plan)
    with watchdog.waiting(plan):
        clock.now += 5.0
        assert not watchdog.check()
        assert not _pass(watchdog, clock, 0.7)
        assert _pass(watchdog, clock, 0.1)


def test_ranks_that_are_suspected_one_after_the_other_do_not_hang() -> None:
    clock, excused = _Clock(), [False]
    watchdog, plan = Watchdog(lambda _: None, clock=clock, excused=lambda: excused[0]), _plan(0)
    _see(watchdog, clock, plan, 0.01)
    watchdog.dispatched(plan)
    with watchdog.waiting(plan):
        for _ in range(5):
            excused[0] = False
            assert not _pass(watchdog, clock, 0.9)
            excused[0] = True
            assert not _pass(watchdog, clock, 0.5)
        excused[0] = False
        assert _pass(watchdog, clock, 1.1)


def test_a_step_that_is_slow_is_none_that_hangs() -> None:
    clock, reports, working = _Clock(), list[str](), [True]
    watchdog, plan = Watchdog(reports.append, lambda: working[0], clock), _plan(0)
    _see(watchdog, clock, plan, 0.01)
    watchdog.dispatched(plan)
    with watchdog.waiting(plan):
        assert not _pass(watchdog, clock, UNKNOWN_SECONDS - 0.1)
        working[0] = False
        assert watchdog.check()
        working[0] = True
        assert len(reports) == 1
        clock.now += 0.2
        assert watchdog.check()  # however much they work


def test_it_checks_by_itself() -> None:
    reports = list[str]()
    clock = _Clock()
    watchdog = Watchdog(reports.append, clock=clock)
    watchdog.start()
    with watchdog.waiting(_plan(0)):
        clock.now += UNKNOWN_SECONDS
        wait_until(lambda: bool(reports), 5)
