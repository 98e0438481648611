"""The prompt budget follows what steps took."""

from __future__ import annotations

from workers.engine.prefill_budget import PrefillBudget
from workers.messages.plan import Chunk, DecodeRow, Plan


def _plan(prompt: int, decode: int = 4, steps: int = 1) -> Plan:
    prefills = ((Chunk(0, 0, tuple(range(prompt)), True),),) if prompt else ()
    return Plan(1, (), prefills, tuple(DecodeRow(slot, 0) for slot in range(decode)), steps=steps)


def test_nothing_is_held_back_before_anything_is_known() -> None:
    assert PrefillBudget(256, 2.0).after(_plan(0), 0.010) == 256


def test_a_step_with_prompts_takes_as_many_times_as_long_as_is_allowed() -> None:
    budget = PrefillBudget(256, 3.0)
    budget.after(_plan(0), 0.010)
    assert budget.after(_plan(100), 0.110) == 20  # 1 ms a position; 10 ms of decoding leave 20


def test_the_budget_stays_between_one_position_and_the_chunk() -> None:
    budget = PrefillBudget(64, 1.0)
    budget.after(_plan(0), 0.010)
    assert budget.after(_plan(50), 0.060) == 1
    generous = PrefillBudget(64, 1000.0)
    generous.after(_plan(0), 0.010)
    assert generous.after(_plan(50), 0.060) == 64


def test_steps_that_draw_several_tokens_count_each() -> None:
    budget = PrefillBudget(256, 2.0)
    budget.after(_plan(0, steps=4), 0.040)
    assert budget.after(_plan(10, decode=0), 0.010) == 10
