"""When guesses are computed."""

from __future__ import annotations

import pytest

from workers.engine.speculation import Speculation
from workers.messages.plan import MAX_DRAFT, DecodeRow, Draft, Plan


def _decode(sequences: int, steps: int = 1) -> Plan:
    return Plan(1, (), (), tuple(DecodeRow(slot, 10) for slot in range(sequences)), steps=steps)


def _verify(sequences: int) -> Plan:
    return Plan(1, (), (), (), drafts=tuple(Draft(slot, 10, (1,) * (1 + MAX_DRAFT)) for slot in range(sequences)))


def _measured(sequences: int, decoding: float, verifying: float) -> Speculation:
    speculation = Speculation()
    speculation.after(_decode(sequences, steps=2), 2 * decoding)
    speculation.after(_verify(sequences), verifying)
    return speculation


def test_before_anything_is_measured_only_convincing_guesses_are_tried() -> None:
    assert Speculation().pays(2, (0.8, 0.75))
    assert not Speculation().pays(2, (0.8, 0.6))
    assert not Speculation().pays(1, ())


@pytest.mark.parametrize("sequences", [1, 2, 4])
def test_guesses_are_computed_when_they_give_more_tokens_a_second(sequences: int) -> None:
    """Half of the guesses right is 1.875 tokens a step, nine in ten 3.439."""
    for verifying, half, most in ((1.5, True, True), (2.5, False, True), (3.6, False, False)):
        speculation = _measured(sequences, 1.0, verifying)
        assert speculation.pays(sequences, (0.5,) * sequences) is half
        assert speculation.pays(sequences, (0.9,) * sequences) is most


def test_one_of_several_must_be_worth_the_others_waiting() -> None:
    speculation = _measured(2, 1.0, 2.2)
    assert speculation.pays(2, (0.9, 0.9))
    assert not speculation.pays(2, (0.9,))


def test_what_is_not_done_is_tried_again_after_a_while() -> None:
    speculation = _measured(1, 1.0, 2.2)
    steps = 0
    while not speculation.pays(1, (0.5,)):
        speculation.after(_decode(1), 1.0)
        steps += 1
    assert 50 < steps < 200
    speculation.after(_verify(1), 2.2)
    assert not speculation.pays(1, (0.5,))


def test_steps_that_compute_prompts_say_nothing() -> None:
    speculation = _measured(1, 1.0, 1.7)
    for _ in range(50):
        speculation.after(Plan(1, (), ((),), (DecodeRow(0, 10),)), 100.0)
    assert not speculation.pays(1, (0.4,))
