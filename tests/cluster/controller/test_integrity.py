"""Hosts hold the same bytes, and meshes compute the same, or that is noticed."""

from __future__ import annotations

import math

from cluster.controller.integrity import CANARY_TOLERANCE, Canary, Digests


def test_what_is_recorded_decides() -> None:
    digests = Digests({"a": 1})
    assert digests.check(["n0", "n1"], [{"a": 1}, {"a": 1}]) is None
    difference = digests.check(["n0", "n1"], [{"a": 1}, {"a": 2}])
    assert difference is not None
    assert (difference.rank, difference.part, difference.others) == (1, "a", "what is recorded")


def test_without_a_record_what_was_there_first_or_what_most_have_decides() -> None:
    digests = Digests({})
    assert digests.check(["n0", "n1"], [{"a": 1}, {"b": 5}]) is None
    assert digests.checked([{"a": 1}, {"b": 5}]) == (0, 2)
    one = digests.check(["n2", "n1"], [{"a": 2}, {"b": 5}])
    assert one is not None
    assert one.rank == 0
    assert digests.check(["n0", "n1"], [{"a": 1}, {"b": 5}]) is None
    three = Digests({})
    three.check(["n0"], [{"a": 9}])
    three.check(["n1"], [{"a": 1}])
    assert three.check(["n2"], [{"a": 1}]) is None
    wrong = three.check(["n0"], [{"a": 9}])
    assert wrong is not None
    assert (wrong.rank, wrong.part) == (0, "a")


def test_what_one_host_alone_holds_must_stay_as_it_was() -> None:
    digests = Digests({})
    assert digests.check(["n0"], [{"a": 1}]) is None
    changed = digests.check(["n0"], [{"a": 2}])
    assert changed is not None
    assert digests.check(["n0"], [{"a": 1}]) is None


def test_a_host_whose_copy_was_mended_is_taken_again() -> None:
    digests = Digests({})
    digests.check(["n0", "n1"], [{"a": 1}, {"a": 2}])
    assert digests.check(["n0", "n1"], [{"a": 1}, {"a": 1}]) is None
    assert digests.checked([{"a": 1}, {"a": 1}]) == (1, 1)


def test_a_mesh_must_compute_what_the_first_did_unless_that_was_the_wrong_one() -> None:
    canary, here, elsewhere = Canary(), ["n0", "n1"], ["n1", "n2"]
    assert not canary.accept([math.nan, -1.0], here)
    assert canary.accept([-1.0, -2.0], here)
    assert canary.accept([-1.0, -2.0 + CANARY_TOLERANCE / 2], elsewhere)
    for _ in range(3):
        assert not canary.accept([-3.0, -2.0], here), "the same hosts prove nothing by saying it again"
    assert canary.accept([-1.0, -2.0], here)
    assert not canary.accept([-3.0, -2.0], elsewhere), "what was right meanwhile counts"
    first = Canary()
    assert first.accept([-9.0], here)
    assert not first.accept([-1.0], here)
    assert first.accept([-1.0], elsewhere), "two against one"
    assert not first.accept([-9.0], here)
