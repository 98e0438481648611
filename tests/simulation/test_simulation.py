"""Seeds that nobody has chosen, a row of them for each day, and what the simulation itself promises.

`make simulate SEEDS=N` plays more. GROKMESH_SEEDS sets how many the suite plays, GROKMESH_SEED with which it begins.
"""

from __future__ import annotations

import datetime
import os

import pytest

from tests.simulation.mutants import MUTANTS, ROOT
from tests.simulation.play import FAULTS, HARMLESS, play, shrink

SEEDS = int(os.environ.get("GROKMESH_SEEDS", "120"))
FIRST = int(os.environ.get("GROKMESH_SEED", datetime.date.today().toordinal() * 1000))


@pytest.mark.slow
def test_whatever_fails_clients_get_what_they_would_have_got() -> None:
    broken = [outcome for outcome in map(play, range(FIRST, FIRST + SEEDS)) if outcome.problem]
    for outcome in broken:
        print(outcome.seed, outcome.problem, *outcome.notes, sep="\n  ")
    assert not broken, f"seeds {[outcome.seed for outcome in broken]}"


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_alone_is_survived(fault: str) -> None:
    outcomes = [play(seed, (fault,)) for seed in range(4)]
    assert [outcome.problem for outcome in outcomes] == [""] * 4
    assert all(outcome.report.whole for outcome in outcomes)


def test_no_mesh_is_lost_for_what_is_no_loss_of_its_hosts() -> None:
    assert [outcome.problem for seed in range(1, 31) if (outcome := play(seed, HARMLESS)).problem] == []


def test_a_seed_replays_bit_for_bit() -> None:
    first, again = (play(17) for _ in range(2))
    assert first == again
    assert first.notes


def test_a_token_that_is_not_the_oracles_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.simulation.clients.completion", lambda prompt, seed, most: (3,) * most)
    assert "is not" in play(1, ()).problem


def test_a_problem_is_shown_with_as_little_as_leaves_it(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = play(3, ("kill leader", "cut off"))
    assert not whole.problem
    assert len(whole.parts) > 8
    monkeypatch.setattr("tests.simulation.clients.completion", lambda prompt, seed, most: (3,) * most)
    smaller = shrink(3, ("kill leader", "cut off"))
    assert smaller.problem
    assert len(smaller.parts) == 1


def test_every_mutant_has_its_place_in_the_code() -> None:
    assert [mutant.name for mutant in MUTANTS if (ROOT / mutant.file).read_text().count(mutant.code) != 1] == []
