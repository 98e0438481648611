"""Whether guesses are worth computing, from how often they are right and what steps took."""

from __future__ import annotations

from collections.abc import Sequence

from workers.messages.plan import MAX_DRAFT, Plan

#: Guesses are looked at when they are right at least so often; where no step has verified any yet, when they are this often.
LEAST, CONVINCING = 0.4, 0.7
#: By how much they must be worth more than what they cost, as what is measured is never quite true.
MARGIN = 1.05

#: Weight of the latest step in the averages.
AGING = 0.2
#: What steps of one kind are thought to take shrinks so with each step of the other, so that they are tried again now and then.
FORGETTING = 0.998


class Speculation:
    """Compares steps that verify guesses with those that decode one token a sequence.

    Steps count as alike if the numbers of their rows have the same binary logarithm, rounded up.
    """

    def __init__(self) -> None:
        self._decoding: dict[int, float] = {}
        self._verifying: dict[int, float] = {}

    def after(self, plan: Plan, seconds: float) -> None:
        """Takes what a plan has taken."""
        if plan.prefills:
            return
        if plan.drafts:
            rows = len(plan.decode) + sum(len(draft.tokens) for draft in plan.drafts)
            _average(self._verifying, rows, seconds)
            _forget(self._decoding)
        elif plan.decode:
            _average(self._decoding, len(plan.decode), seconds / plan.steps)
            _forget(self._verifying)

    def pays(self, sequences: int, shares: Sequence[float]) -> bool:
        """Whether guesses for some of the running sequences, of which so large `shares` have been right, give more tokens a
        second than one token for each sequence a step."""
        if not shares:
            return False
        rows = sequences + MAX_DRAFT * len(shares)
        decoding, verifying = self._decoding.get(_size(sequences)), self._verifying.get(_size(rows))
        if decoding is None or verifying is None:
            return min(shares) >= CONVINCING
        # Of each guess, all before it must be right too.
        expected = sequences + sum(share**i for share in shares for i in range(1, MAX_DRAFT + 1))
        return expected * decoding > MARGIN * sequences * verifying


def _size(rows: int) -> int:
    return (rows - 1).bit_length()


def _average(averages: dict[int, float], rows: int, latest: float) -> None:
    before = averages.get(_size(rows), latest)
    averages[_size(rows)] = before + AGING * (latest - before)


def _forget(averages: dict[int, float]) -> None:
    for size in averages:
        averages[size] *= FORGETTING
