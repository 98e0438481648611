"""What a load came to: figures, a table, a picture."""

from __future__ import annotations

import collections
import dataclasses
import itertools
import math
import pathlib
from collections.abc import Sequence
from typing import Any

from tools.bench.service_load import Sample

PERCENTILES = (50, 90, 99)


@dataclasses.dataclass(frozen=True)
class Objective:
    """What a request must keep to count as good: seconds to its first token, and seconds a token after it."""

    time_to_first_token: float
    time_per_output_token: float

    def met(self, sample: Sample) -> bool:
        """Whether a request kept it."""
        if sample.error or not sample.tokens:
            return False
        each = sample.time_per_output_token or 0.0
        return sample.time_to_first_token <= self.time_to_first_token and each <= self.time_per_output_token


def percentile(values: Sequence[float], percent: float) -> float:
    """The smallest value that `percent` of all do not exceed; NaN of none."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(len(ordered) * percent / 100) - 1)] if ordered else math.nan


def summarize(samples: Sequence[Sample], objective: Objective) -> dict[str, Any]:
    """Figures of a load, in seconds, as JSON can hold them.

    Times of requests that failed are left out; they are counted by their error.
    """
    good = [sample for sample in samples if not sample.error and sample.tokens]
    seconds = max((s.ended for s in samples), default=0.0) - min((s.began for s in samples), default=0.0)
    gaps = [b - a for sample in good for a, b in itertools.pairwise(sample.tokens)]
    measures = {
        "time_to_first_token": [s.time_to_first_token for s in good],
        "time_per_output_token": [each for s in good if (each := s.time_per_output_token) is not None],
        "inter_token_latency": gaps,
        "end_to_end": [s.ended - s.began for s in good],
    }
    tokens = sum(len(s.tokens) for s in good)
    return {
        "requests": len(samples),
        "seconds": seconds,
        "errors": dict(collections.Counter(s.error for s in samples if s.error)),
        "prompt_tokens_per_second": sum(s.prompt for s in good) / seconds if seconds else math.nan,
        "completion_tokens_per_second": tokens / seconds if seconds else math.nan,
        "requests_per_second": len(good) / seconds if seconds else math.nan,
        "goodput_requests_per_second": sum(map(objective.met, samples)) / seconds if seconds else math.nan,
        **{
            name: {f"p{percent}": percentile(values, percent) for percent in PERCENTILES}
            for name, values in measures.items()
        },
    }


def table(summary: dict[str, Any]) -> str:
    """The figures as text, times in milliseconds."""
    lines = [
        f"{summary['requests']} requests in {summary['seconds']:.1f} s, errors: {summary['errors'] or 'none'}",
        f"{summary['completion_tokens_per_second']:.1f} tokens/s generated, {summary['prompt_tokens_per_second']:.1f} prompt "
        f"tokens/s, {summary['requests_per_second']:.2f} requests/s, goodput {summary['goodput_requests_per_second']:.2f}",
        f"{'ms':<22}" + "".join(f"{f'p{percent}':>10}" for percent in PERCENTILES),
    ]
    for name, values in summary.items():
        if isinstance(values, dict) and "p50" in values:
            lines.append(f"{name:<22}" + "".join(f"{values[f'p{p}'] * 1000:>10.1f}" for p in PERCENTILES))
    return "\n".join(lines)


def plot(samples: Sequence[Sample], path: pathlib.Path) -> None:
    """Draws times to the first token, gaps between tokens and tokens a second over the load, as a PNG.

    Raises:
      ImportError: matplotlib is not installed.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    good = [sample for sample in samples if not sample.error and sample.tokens]
    figure, (first, gaps, rate) = pyplot.subplots(1, 3, figsize=(15, 4), layout="constrained")
    first.plot([s.began for s in good], [s.time_to_first_token * 1000 for s in good], ".")
    first.set(title="time to first token", xlabel="sent after (s)", ylabel="ms")
    gaps.hist([(b - a) * 1000 for s in good for a, b in itertools.pairwise(s.tokens)], bins=60, log=True)
    gaps.set(title="time between tokens", xlabel="ms", ylabel="tokens")
    seconds = collections.Counter(int(at) for s in good for at in s.tokens)
    rate.step(range(max(seconds, default=0) + 1), [seconds[i] for i in range(max(seconds, default=0) + 1)])
    rate.set(title="tokens generated", xlabel="s", ylabel="tokens/s")
    figure.savefig(path)
    pyplot.close(figure)
