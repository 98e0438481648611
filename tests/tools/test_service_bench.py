"""Figures of a load, from samples whose figures are known."""

from __future__ import annotations

import math

import pytest

from tools.bench.service_load import Lengths, Sample
from tools.bench.service_report import Objective, percentile, summarize, table

OBJECTIVE = Objective(time_to_first_token=1.0, time_per_output_token=0.1)


def _sample(began: float, *tokens: float, error: str = "") -> Sample:
    return Sample(began, 10, list(tokens), tokens[-1] if tokens else began, error)


def test_a_percentile_is_one_of_the_values() -> None:
    assert percentile([3.0, 1.0, 2.0], 50) == 2.0
    assert percentile([float(i) for i in range(1, 101)], 99) == 99.0
    assert math.isnan(percentile([], 50))


def test_times_are_taken_from_the_clients_side() -> None:
    samples = [_sample(0.0, 0.5, 0.6, 0.7), _sample(1.0, 1.2, 1.6), _sample(2.0, error="UNAVAILABLE")]
    summary = summarize(samples, OBJECTIVE)
    assert summary["time_to_first_token"]["p99"] == 0.5
    assert summary["time_per_output_token"]["p50"] == pytest.approx(0.1)
    assert summary["inter_token_latency"]["p99"] == pytest.approx(0.4)
    assert summary["end_to_end"]["p50"] == pytest.approx(0.6)
    assert summary["errors"] == {"UNAVAILABLE": 1}
    assert summary["seconds"] == 2.0
    assert summary["completion_tokens_per_second"] == 2.5
    assert "UNAVAILABLE" in table(summary)


def test_goodput_counts_who_kept_the_objective() -> None:
    kept, late, slow = _sample(0.0, 0.9, 0.95), _sample(0.0, 1.1, 1.15), _sample(0.0, 0.5, 1.0)
    assert [OBJECTIVE.met(sample) for sample in (kept, late, slow, _sample(0.0))] == [True, False, False, False]
    assert summarize([kept, late, slow], OBJECTIVE)["goodput_requests_per_second"] == pytest.approx(1 / 1.15)


@pytest.mark.parametrize("text", ["", "0", "5:3", "a:b", "3:"])
def test_lengths_that_are_none_are_refused(text: str) -> None:
    if text == "3:":
        assert Lengths.parse(text) == Lengths(3, 3)
        return
    with pytest.raises(ValueError, match=r"length|invalid literal"):
        Lengths.parse(text)
