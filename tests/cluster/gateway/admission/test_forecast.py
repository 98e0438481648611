"""How long a request would wait."""

from __future__ import annotations

import pytest

from cluster.gateway.admission.forecast import Capacity, Forecast
from workers.messages.plan import Sampling
from workers.messages.request import Ahead, Request

TOKEN_SECONDS = 0.02


def _request(max_tokens: int = 100, prompt: int = 10) -> Request:
    return Request("r", tuple(range(prompt)), max_tokens, Sampling())


def _taught(used: float = 1.0) -> Forecast:
    forecast = Forecast()
    for _ in range(300):
        drawn = int(100 * used)
        forecast.learn(_request(), drawn, 0.0, (drawn - 1) * TOKEN_SECONDS)
    return forecast


def test_nobody_waits_where_slots_are_free_or_nothing_is_known() -> None:
    capacity = Capacity(slots=4, positions=10_000)
    assert Forecast().wait([Ahead.of(_request(), 0)] * 9, capacity) == 0
    assert _taught().wait([Ahead.of(_request(), 0)] * 3, capacity) == 0


def test_who_comes_waits_for_those_before() -> None:
    forecast, capacity = _taught(), Capacity(slots=2, positions=10_000)
    running = [Ahead.of(_request(), 20), Ahead.of(_request(), 70)]
    assert forecast.wait(running, capacity) == pytest.approx(30 * TOKEN_SECONDS)
    assert forecast.wait([*running, Ahead.of(_request(), 0)], capacity) == pytest.approx(80 * TOKEN_SECONDS)
    assert forecast.wait([Ahead.of(_request(20), 0), *running], capacity) == pytest.approx(50 * TOKEN_SECONDS)


def test_requests_that_end_early_and_a_cache_that_holds_few_are_learnt() -> None:
    ahead = [Ahead.of(_request(), 0)] * 20
    whole = _taught().wait(ahead, Capacity(4, 10_000))
    assert _taught(used=0.5).wait(ahead, Capacity(4, 10_000)) == pytest.approx(whole / 2, rel=0.05)
    assert _taught().wait(ahead, Capacity(4, 230)) == pytest.approx(
        2 * whole
    )  # two requests of 110 positions at a time
    assert _taught().own(_request()) == pytest.approx(100 * TOKEN_SECONDS)


def test_long_prompts_of_which_one_token_is_wanted_do_not_make_others_seem_slow() -> None:
    forecast, capacity = _taught(), Capacity(slots=1, positions=10_000)
    for _ in range(300):
        forecast.learn(_request(max_tokens=1, prompt=8000), 1, 4.0, 0.0)
    chatting, scoring = Ahead.of(_request(), 50), Ahead.of(_request(max_tokens=1, prompt=8000), 0)
    assert forecast.wait([chatting], capacity) == pytest.approx(50 * TOKEN_SECONDS)
    assert forecast.wait([scoring], capacity) == pytest.approx(4.0, rel=0.01)
