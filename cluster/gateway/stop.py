"""Texts that end a completion."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence


@dataclasses.dataclass(frozen=True)
class StopTexts:
    """Stop texts, each with its borders: for each beginning of it, how long the longest shorter beginning is that ends it. With
    them each character of a completion is looked at only a few times (Knuth, Morris and Pratt)."""

    texts: tuple[str, ...]
    borders: tuple[tuple[int, ...], ...]
    shown: bool

    @classmethod
    def of(cls, texts: Sequence[str], *, shown: bool = False) -> StopTexts:
        """Prepares texts, none of them empty; `shown`: whether the one that ends a completion is a part of it."""
        return cls(tuple(texts), tuple(_borders(text) for text in texts), shown)


def _borders(text: str) -> tuple[int, ...]:
    borders, length = [0], 0
    for character in text[1:]:
        while length and text[length] != character:
            length = borders[length - 1]
        length += text[length] == character
        borders.append(length)
    return tuple(borders)


class StopMatcher:
    """Finds the first stop text in a stream of text, and holds back what may yet become one. The first is the one that is
    complete first, of several the longest."""

    def __init__(self, stops: StopTexts) -> None:
        self._stops = stops
        #: How long a beginning of each stop text ends what has come.
        self._matched = [0] * len(stops.texts)
        self._held = ""

    def push(self, text: str) -> tuple[str, bool]:
        """Takes new text; returns what may be shown, and whether a stop text ended it."""
        if not self._matched:
            return text, False
        whole = self._held + text
        for at, character in enumerate(text, len(self._held) + 1):
            found = self._step(character)
            if found:
                self._held = ""
                return whole[: at if self._stops.shown else at - found], True
        keep = max(self._matched)
        shown, self._held = whole[: len(whole) - keep], whole[len(whole) - keep :]
        return shown, False

    def flush(self) -> str:
        """What was held back, once no more text comes."""
        held, self._held = self._held, ""
        return held

    def _step(self, character: str) -> int:
        """Takes a character; the length of the longest stop text that ends with it, 0 for none."""
        found = 0
        for i, (stop, borders) in enumerate(zip(self._stops.texts, self._stops.borders, strict=True)):
            length = self._matched[i]
            while length and stop[length] != character:
                length = borders[length - 1]
            length += stop[length] == character
            if length == len(stop):
                found = max(found, length)
                length = 0
            self._matched[i] = length
        return found
