"""What keys use adds up over gateways, and over controllers, services and gateways that come and go."""

from __future__ import annotations

import pytest

from cluster.controller.ledger import KeyState, KeyUse, Ledger


def _use(spent: float, missing: float = 0.0, requests: int = 0) -> dict[str, KeyUse]:
    return {"alice": KeyUse(60, spent, missing, requests)}


def test_what_gateways_spend_adds_up_and_time_makes_it_good() -> None:
    ledger = Ledger()
    ledger.report("one", _use(0), 0.0)
    ledger.report("other", _use(0), 0.0)
    ledger.report("one", _use(30, requests=2), 1.0)
    assert ledger.report("other", _use(20, requests=1), 1.0) == {"alice": KeyState(60, 50.0, 2)}
    assert ledger.report("one", _use(30, requests=2), 11.0)["alice"].missing == pytest.approx(40.0)
    assert ledger.budgets(1000.0) == {}


def test_requests_of_a_gateway_that_is_gone_count_no_more_but_what_they_spent_does() -> None:
    ledger = Ledger()
    ledger.report("one", _use(0), 0.0)
    ledger.report("one", _use(30, requests=2), 0.0)
    ledger.forget("one")
    assert ledger.report("other", {}, 0.0) == {"alice": KeyState(60, 30.0, 0)}


def test_another_controller_learns_from_gateways_what_the_last_one_knew() -> None:
    ledger = Ledger()
    ledger.report("one", _use(70, missing=45.0), 0.0)
    assert ledger.report("other", _use(10, missing=45.0), 0.0)["alice"].missing == 45.0
    assert ledger.report("one", _use(75, missing=50.0), 0.0)["alice"].missing == 50.0


def test_a_service_owes_what_the_one_before_owed() -> None:
    ledger = Ledger()
    ledger.inherit({"alice": (60, 80.0), "bob": (60, 3.0)}, 5.0, 0.0)
    assert ledger.budgets(0.0) == {"alice": (60, 75.0)}
    assert ledger.report("one", {}, 0.0)["alice"] == KeyState(60, 75.0, 0)


def test_a_limit_that_has_changed_begins_with_a_whole_budget() -> None:
    ledger = Ledger()
    ledger.report("one", _use(0), 0.0)
    ledger.report("one", _use(50), 0.0)
    assert ledger.report("one", {"alice": KeyUse(600, 50)}, 0.0)["alice"] == KeyState(600, 0.0, 0)
