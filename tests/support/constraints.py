"""Grammars that are followed within the test's own process."""

from __future__ import annotations

from workers.messages.request import Request
from workers.text.grammar import GrammarError, Grammars


class LocalConstraint:
    """A `workers.messages.request.Constraint` that is always ready."""

    ready = True

    def __init__(self, grammars: Grammars, request: Request) -> None:
        self.problem = ""
        self.closed = False
        self._mask = b""
        self._matcher = grammars.matcher(request.grammar, request.sampling.allowed_tokens)
        for token in request.resumed:
            self._matcher.accept(token)
        self._look()

    def mask(self) -> bytes:
        """What may come next."""
        return self._mask

    def accept(self, token: int) -> None:
        """Takes a token."""
        self._matcher.accept(token)
        self._look()

    def close(self) -> None:
        """Ends it."""
        self.closed = True

    def _look(self) -> None:
        try:
            self._mask = self._matcher.mask()
        except GrammarError as error:
            self.problem = str(error)
