"""Text to tokens and, token by token, back."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence

import sentencepiece

#: What SentencePiece decodes an incomplete UTF-8 sequence to.
_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
#: Bytes that a character can take, each a token.
_LONGEST_CHARACTER = 4
#: Prompt tokens that give the first tokens of a completion their context.
_CONTEXT = 8


class TokenizerError(ValueError):
    """A tokenizer that can't be read."""


class Tokenizer:
    """A SentencePiece model, as Grok-1 has one. Grok-1 puts no token before a prompt."""

    def __init__(self, path: pathlib.Path) -> None:
        if not path.is_file():
            raise TokenizerError(f"{path}: no such file; a checkpoint to be served needs its SentencePiece model")
        self._processor = sentencepiece.SentencePieceProcessor()
        try:
            self._processor.Load(str(path))
        except (OSError, RuntimeError) as error:
            raise TokenizerError(f"{path}: no SentencePiece model: {error}") from error

    @property
    def vocab_size(self) -> int:
        """Number of tokens."""
        return int(self._processor.GetPieceSize())

    def encode(self, text: str) -> list[int]:
        """The tokens of a text."""
        return list(self._processor.EncodeAsIds(text))

    def decode(self, ids: Sequence[int]) -> str:
        """The text of tokens. Those outside of the vocabulary stand for nothing."""
        return str(self._processor.DecodeIds([id for id in ids if id < self.vocab_size]))

    def piece(self, id: int) -> str:
        """The piece of text that a token stands for, with U+2581 for a space."""
        return str(self._processor.IdToPiece(id)) if id < self.vocab_size else ""


class Detokenizer:
    """Turns a completion into text token by token. The pieces joined are the text that the completion adds to its prompt.

    Each step decodes a short window: the tokens since the last text was told, and those that told it before.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._window = list(prompt[-_CONTEXT:])
        self._told = len(self._window)

    def push(self, token: int) -> str:
        """The text that is certain now and was not before; none while a character is incomplete."""
        self._window.append(token)
        before, text = self._decode()
        fresh = text[len(before) :]
        missing = len(fresh) - len(fresh.rstrip(_REPLACEMENT))  # one for each byte of an incomplete character
        if not fresh or 0 < missing < _LONGEST_CHARACTER:
            return ""
        return self._tell(before, text)

    def flush(self) -> str:
        """The rest, however incomplete."""
        return self._tell(*self._decode())

    def _decode(self) -> tuple[str, str]:
        return self._tokenizer.decode(self._window[: self._told]), self._tokenizer.decode(self._window)

    def _tell(self, before: str, text: str) -> str:
        fresh = self._window[self._told :]
        self._window = self._window[self._told :] if len(fresh) >= _CONTEXT else self._window[-_CONTEXT:]
        self._told = len(self._window)
        return text[len(before) :]
