"""Which hosts are avoided."""

from __future__ import annotations

from cluster.controller.quarantine import AVOIDED_SECONDS, MEMORY_SECONDS, TOO_MANY, Suspects


def test_a_host_that_lost_a_worker_is_avoided_for_a_while() -> None:
    suspects = Suspects()
    assert suspects.avoided(0) == ()
    suspects.lost("a", 100)
    assert suspects.avoided(101) == ("a",)
    assert suspects.avoided(100 + AVOIDED_SECONDS) == ()


def test_each_further_loss_doubles_the_time_up_to_what_is_remembered() -> None:
    suspects = Suspects()
    for _ in range(10):
        suspects.lost("a", 0)
    suspects.lost("b", 0)
    suspects.lost("b", 1)
    assert suspects.avoided(2 * AVOIDED_SECONDS) == ("b", "a"), "the last first"
    assert suspects.avoided(2 * AVOIDED_SECONDS + 1) == ("a",)
    assert suspects.avoided(MEMORY_SECONDS - 1) == ("a",)
    assert suspects.avoided(MEMORY_SECONDS + 1) == ()


def test_a_host_that_loses_one_after_the_other_is_failing() -> None:
    suspects = Suspects()
    for i in range(TOO_MANY):
        assert suspects.failing(i) == frozenset()
        suspects.lost("a", i)
    assert suspects.failing(TOO_MANY) == {"a"}
    assert suspects.failing(MEMORY_SECONDS + 1) == frozenset(), "one of them is forgotten"


def test_a_node_that_nobody_knows_is_not_avoided() -> None:
    suspects = Suspects()
    suspects.lost("", 0)
    assert suspects.avoided(1) == ()
