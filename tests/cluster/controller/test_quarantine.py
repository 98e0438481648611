"""Which hosts are avoided."""

from __future__ import annotations

from cluster.controller.quarantine import AVOIDED_SECONDS, MEMORY_SECONDS, TOO_MANY, Quarantine


def test_a_host_that_lost_a_worker_is_avoided_for_a_while() -> None:
    quarantine = Quarantine()
    assert quarantine.avoided(0) == ()
    quarantine.lost("a", 100)
    assert quarantine.avoided(101) == ("a",)
    assert quarantine.avoided(100 + AVOIDED_SECONDS) == ()


def test_each_further_loss_doubles_the_time_up_to_what_is_remembered() -> None:
    quarantine = Quarantine()
    for _ in range(10):
        quarantine.lost("a", 0)
    quarantine.lost("b", 0)
    quarantine.lost("b", 1)
    assert quarantine.avoided(2 * AVOIDED_SECONDS) == ("b", "a"), "the last first"
    assert quarantine.avoided(2 * AVOIDED_SECONDS + 1) == ("a",)
    assert quarantine.avoided(MEMORY_SECONDS - 1) == ("a",)
    assert quarantine.avoided(MEMORY_SECONDS + 1) == ()


def test_a_host_that_loses_one_after_the_other_is_failing() -> None:
    quarantine = Quarantine()
    for i in range(TOO_MANY):
        assert quarantine.failing(i) == frozenset()
        quarantine.lost("a", i)
    assert quarantine.failing(TOO_MANY) == {"a"}
    assert quarantine.failing(MEMORY_SECONDS + 1) == frozenset(), "one of them is forgotten"


def test_a_node_that_nobody_knows_is_not_avoided() -> None:
    quarantine = Quarantine()
    quarantine.lost("", 0)
    assert quarantine.avoided(1) == ()
