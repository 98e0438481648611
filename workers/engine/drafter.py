"""Guesses of a sequence's next tokens from its own past: what followed the last time that the same tokens stood there."""

from __future__ import annotations

from collections.abc import Sequence

from workers.messages.plan import MAX_DRAFT

#: Tokens that must stand alike.
NGRAM = 3

#: Weight of the latest guess in the share of right ones.
AGING = 0.125


class NgramDrafter:
    """Watches one sequence. It guesses all the time, which costs nothing.

    Attributes:
      share: how many of the last guesses, weighed by age, would have been right; a token without a guess counts as a wrong one.
    """

    def __init__(self, prompt: Sequence[int]) -> None:
        self._tokens: list[int] = []
        self._followers: dict[tuple[int, ...], int] = {}
        self._guess: int | None = None
        self.share = 0.0
        for token in prompt:
            self._append(token)
        self._guess = next(iter(self.propose(1)), None)

    def add(self, token: int) -> None:
        """Takes the sequence's next token."""
        right = self._guess == token
        self.share += AGING * (right - self.share)
        self._append(token)
        self._guess = next(iter(self.propose(1)), None)

    def propose(self, most: int) -> tuple[int, ...]:
        """Up to `most` tokens (and at most MAX_DRAFT) that may follow; none if nothing alike stood before."""
        place = self._followers.get(tuple(self._tokens[-NGRAM:]))
        return () if place is None else tuple(self._tokens[place : place + min(most, MAX_DRAFT)])

    def _append(self, token: int) -> None:
        # What follows the tokens before is known only now, so that no sequence finds itself.
        if len(self._tokens) >= NGRAM:
            self._followers[tuple(self._tokens[-NGRAM:])] = len(self._tokens)
        self._tokens.append(token)
