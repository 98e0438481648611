"""A rank is at work while its process uses processors, and not because it lives."""

from __future__ import annotations

from workers.host.activity import WINDOW_SECONDS, Activity


def test_a_rank_that_waits_is_not_at_work_though_it_pulses() -> None:
    activity = Activity()
    for i in range(40):
        activity.note(0, 7.0 + 0.005 * i, now=0.25 * i)  # a fiftieth of a processor
        activity.note(1, 3.0, now=0.25 * i)
        assert not activity.working(now=0.25 * i)


def test_one_rank_at_work_is_enough_and_is_forgotten_soon() -> None:
    activity = Activity()
    for i in range(8):
        activity.note(0, 1.0, now=0.25 * i)
        activity.note(1, 0.05 * i, now=0.25 * i)  # a fifth of a processor, as of one that is starved
    assert activity.working(now=1.75)
    assert not activity.working(now=1.75 + WINDOW_SECONDS + 0.1), "what is not heard of any more"
