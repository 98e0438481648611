"""Guesses of a sequence's next tokens from its own past: what followed the last time that the same tokens stood there."""

from __future__ import annotations

from collections.abc import Sequence

from workers.messages.plan import MAX_DRAFT

#: Tokens that must stand alike.
NGRAM = 3

#: Guesses count when this share of the last ones, weighed by age, would have been right; they stop counting below the other.
WORTH, WORTHLESS = 0.7, 0.5

#: Weight of the latest guess in that share.
AGING = 0.125


class NgramDrafter:
    """Watches one sequence. It guesses all the time, which costs nothing, and says when its guesses are worth computing."""

    def __init__(self, prompt: Sequence[int]) -> None:
        self._tokens: list[int] = []
        self._followers: dict[tuple[int, ...], int] = {}
        self._guess: int | None = None
        self._share = 0.0
        self.enabled = False
        for token in prompt:
            self._append(token)
        self._guess = next(iter(self.propose(1)), None)

    def add(self, token: int) -> None:
        """Takes the sequence's next token."""
        right = self._guess == token
        self._share += AGING * (right - self._share)
        self.enabled = self._share > (WORTHLESS if self.enabled else WORTH)
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
