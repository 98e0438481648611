"""How many prompt positions a step may compute beside decoding, from what steps took."""

from __future__ import annotations

from workers.messages.plan import Plan

#: Weight of the latest step in the averages.
AGING = 0.1


class PrefillBudget:
    """Keeps steps that also compute prompts within `slowdown` times the length of steps that don't.

    A step's time is taken as that of its decoding plus so much a prompt position, both averaged over the latest steps.
    """

    def __init__(self, chunk: int, slowdown: float) -> None:
        self._chunk = chunk
        self._slowdown = slowdown
        self._decode: float | None = None
        self._position: float | None = None

    def after(self, plan: Plan, seconds: float) -> int:
        """The budget for the next step, after `plan` took `seconds`: at least 1, at most the chunk."""
        if plan.decode and not plan.prefills and not plan.drafts:
            self._decode = _averaged(self._decode, seconds / plan.steps)
        elif plan.prompt_tokens:
            rest = seconds - (self._decode or 0.0 if plan.decode else 0.0)
            self._position = _averaged(self._position, max(rest, 0.0) / plan.prompt_tokens)
        if not self._decode or not self._position:
            return self._chunk
        return max(1, min(self._chunk, int((self._slowdown - 1) * self._decode / self._position)))


def _averaged(average: float | None, latest: float) -> float:
    return latest if average is None else average + AGING * (latest - average)
