"""Completions that must follow a JSON schema, a regular expression or a choice: which tokens may come next.

The work is llguidance's. Of the kept libraries it alone has no dependencies, takes all three kinds and needs no index over the
vocabulary beforehand: xgrammar brings PyTorch, outlines-core knows regular expressions only.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper

from workers.tokenizer import Tokenizer

#: Bytes of a schema, an expression or a choice.
MAX_SOURCE = 64 * 1024


class GrammarError(ValueError):
    """A schema, expression or choice that can't be followed."""


def json_schema(schema: str) -> str:
    """The grammar of the JSON values that a schema describes. Raises GrammarError."""
    try:
        parsed = json.loads(schema)
    except (ValueError, RecursionError) as error:
        raise GrammarError(f"is no JSON: {error}") from error
    if not isinstance(parsed, (dict, bool)):
        raise GrammarError("must be a JSON object or a boolean")
    # Without spaces and line ends, which a model may go on with for ever.
    return str(LLMatcher.grammar_from_json_schema(schema, defaults={"whitespace_flexible": False}))


def regex(expression: str) -> str:
    """The grammar of the texts that match an expression from beginning to end."""
    return str(LLMatcher.grammar_from_regex(expression))


def choice(texts: Sequence[str]) -> str:
    """The grammar of exactly these texts. Raises GrammarError."""
    if not texts or not all(texts):
        raise GrammarError("must have texts, none of them empty")
    return str(LLMatcher.grammar_from_lark("start: " + " | ".join(json.dumps(text) for text in texts)))


class Grammars:
    """Grammars over one tokenizer's tokens."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_token: int) -> None:
        self._eos = eos_token
        self._vocab_size = vocab_size
        pieces = [tokenizer.spelled(id) for id in range(vocab_size)]
        self._tokenizer = LLTokenizer(TokenizerWrapper(_Pieces(pieces, eos_token)), n_vocab=vocab_size)

    def check(self, grammar: str) -> None:
        """Raises GrammarError if no completion can follow `grammar`."""
        problem = LLMatcher.validate_grammar(grammar, self._tokenizer)
        if problem:
            raise GrammarError(str(problem))
        matcher = self.matcher(grammar)
        matcher.mask()
        if matcher.problem:
            raise GrammarError(matcher.problem)

    def matcher(self, grammar: str) -> Matcher:
        """Follows one completion."""
        return Matcher(
            LLMatcher(self._tokenizer, grammar, log_level=0, limits=LLParserLimits()), self._vocab_size, self._eos
        )


class Matcher:
    """Which tokens a completion may go on with; an `engine.request.Constraint`.

    Where the grammar allows nothing more, or is found too complex, the end token alone is allowed.
    """

    def __init__(self, matcher: LLMatcher, vocab_size: int, eos_token: int) -> None:
        self._matcher = matcher
        self._size = -(-vocab_size // 32) * 4
        self._only_eos = (1 << eos_token).to_bytes(self._size, "little")

    @property
    def problem(self) -> str:
        """What went wrong; empty if nothing did."""
        return str(self._matcher.get_error()) if self._matcher.is_error() else ""

    def mask(self) -> bytes:
        """A bit for each token, in little-endian words of 32."""
        if self._matcher.is_error() or self._matcher.is_stopped():
            return self._only_eos
        mask = bytes(self._matcher.compute_bitmask())[: self._size].ljust(self._size, b"\0")
        return mask if any(mask) and not self._matcher.is_error() else self._only_eos

    def accept(self, token: int) -> None:
        """Takes the next token."""
        self._matcher.consume_token(token)


class _Pieces:
    """What llguidance asks of a tokenizer."""

    def __init__(self, pieces: list[bytes | None], eos_token: int) -> None:
        self._ids = {piece: id for id, piece in reversed(list(enumerate(pieces))) if piece}
        self._longest = max(map(len, self._ids))
        self.eos_token_id = eos_token
        self.bos_token_id = None
        self.tokens = [piece or b"" for piece in pieces]
        self.special_token_ids = [id for id, piece in enumerate(pieces) if piece is None]

    def __call__(self, text: bytes) -> list[int]:
        """The longest pieces from the left: SentencePiece itself would put a space before the text."""
        ids, at = [], 0
        while at < len(text):
            ends = range(min(len(text), at + self._longest), at, -1)
            end = next((end for end in ends if text[at:end] in self._ids), None)
            if end is None:
                break  # no token spells this byte
            ids.append(self._ids[text[at:end]])
            at = end
        return ids
