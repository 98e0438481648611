"""Traces of steps never disturb the steps, whoever asks for them and gives up."""

from __future__ import annotations

import concurrent.futures
import time
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import pytest

from workers.runtime.profiler import Profiler, ProfilerError


@pytest.fixture
def pool() -> Iterator[concurrent.futures.ThreadPoolExecutor]:
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        yield pool


def _step(profiler: Profiler) -> None:
    profiler.step()
    jax.block_until_ready(jnp.ones(8) + 1)
    time.sleep(0.01)


def test_a_trace_holds_the_steps(pool: concurrent.futures.ThreadPoolExecutor) -> None:
    profiler = Profiler()
    asked = pool.submit(profiler.trace, 3, 30.0)
    while not asked.done():
        _step(profiler)
    assert any(path.endswith(".xplane.pb") and content for path, content in asked.result().items())


def test_who_gives_up_in_the_middle_leaves_nothing_behind(pool: concurrent.futures.ThreadPoolExecutor) -> None:
    profiler = Profiler()
    given_up = pool.submit(profiler.trace, 100_000, 0.3)
    while not given_up.done():
        _step(profiler)
    with pytest.raises(ProfilerError, match="of 100000 steps were to come"):
        given_up.result()
    asked = pool.submit(profiler.trace, 2, 30.0)  # before the step that ends the one given up
    time.sleep(0.05)
    while not asked.done():
        _step(profiler)
    assert asked.result()


def test_an_idle_engine_gives_no_trace_and_two_are_not_taken_at_once(
    pool: concurrent.futures.ThreadPoolExecutor,
) -> None:
    profiler = Profiler()
    first = pool.submit(profiler.trace, 2, 0.5)
    time.sleep(0.1)
    with pytest.raises(ProfilerError, match="another trace"):
        profiler.trace(2, 0.1)
    with pytest.raises(ProfilerError, match="2 of 2 steps"):
        first.result()
    _step(profiler)  # nothing is begun for one that has gone
    assert profiler._span is None
