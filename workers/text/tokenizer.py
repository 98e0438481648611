"""Text to tokens and, token by token, back."""

from __future__ import annotations

import codecs
import functools
from collections.abc import Callable, Sequence

import sentencepiece

from workers.checkpoint.storage import Location

#: Bytes that a character can take, each a token.
_LONGEST_CHARACTER = 4
#: Prompt tokens that give the first tokens of a completion their context.
_CONTEXT = 8


class TokenizerError(ValueError):
    """A tokenizer that can't be read."""


class Tokenizer:
    """A SentencePiece model, as Grok-1 has one. Grok-1 puts no token before a prompt."""

    def __init__(self, path: Location) -> None:
        if not path.is_file():
            raise TokenizerError(f"{path}: no such file; a checkpoint to be served needs its SentencePiece model")
        self._processor = sentencepiece.SentencePieceProcessor()
        try:
            self._processor.LoadFromSerializedProto(path.read_bytes())
        except (OSError, RuntimeError) as error:
            raise TokenizerError(f"{path}: no SentencePiece model: {error}") from error
        #: Number of tokens.
        self.vocab_size = int(self._processor.GetPieceSize())
        # Now, as processes that are forked for one job each would otherwise make these tables anew.
        tokens = range(self.vocab_size)
        self._controls = frozenset(id for id in tokens if self._processor.IsControl(id))
        self._bytes = {id: int(self._processor.IdToPiece(id)[3:5], 16) for id in tokens if self._processor.IsByte(id)}

    @functools.cached_property
    def longest_piece(self) -> int:
        """Bytes of the longest text that a token stands for."""
        return max(len(self.spelled(id) or b"") for id in range(self.vocab_size))

    def encode(self, text: str) -> list[int]:
        """The tokens of a text."""
        return list(self._processor.EncodeAsIds(text))

    def decode(self, ids: Sequence[int]) -> str:
        return self.decode_texts([id for id in ids if not self.has_no_text(id)])

    def decode_texts(self, ids: list[int]) -> str:
        """`decode` of tokens that all stand for text."""
        return str(self._processor.DecodeIds(ids))

    def has_no_text(self, id: int) -> bool:
        """Whether a token stands for no text at all: one that ends or pads, or is outside of the vocabulary."""
        return id >= self.vocab_size or id in self._controls

    def spelled(self, id: int) -> bytes | None:
        """The bytes that a token adds to a text, None if it stands for no text."""
        if self.has_no_text(id) or self._processor.IsUnknown(id):
            return None
        byte = self.byte(id)
        return bytes([byte]) if byte is not None else str(self._processor.IdToPiece(id)).replace("\u2581", " ").encode()

    def byte(self, id: int) -> int | None:
        """The byte that a token stands for, None if it stands for anything else."""
        return self._bytes.get(id)

    def piece(self, id: int) -> str:
        """The piece of text that a token stands for, with U+2581 for a space."""
        return str(self._processor.IdToPiece(id)) if id < self.vocab_size else ""

    def control_pieces(self, end: int) -> dict[str, str | None]:
        """How the tokens are written that begin a text, pad it and stand for what is unknown, if there are any, and `end`."""
        ids = {
            "bos_token": self._processor.bos_id(),
            "eos_token": end,
            "pad_token": self._processor.pad_id(),
            "unk_token": self._processor.unk_id(),
        }
        return {name: self.piece(id) if id >= 0 else None for name, id in ids.items()}


class Detokenizer:
    """Turns a completion into text token by token. The pieces joined are the text that the completion adds to its prompt.

    Each step decodes a short window: some tokens whose text was returned (or is the prompt's), and those since. A character of
    which only some bytes have come, each a token, stands as U+FFFD, one a byte, at the end of the window's text, and is held
    back.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._window = [id for id in prompt if not tokenizer.has_no_text(id)][-_CONTEXT:]
        self._told = self._certain(tokenizer.decode_texts(self._window))

    def push(self, token: int) -> str:
        """The text that is certain now and was not before; none while a character is incomplete."""
        if self._tokenizer.has_no_text(token):
            return ""
        self._window.append(token)
        return self._tell(self._certain)

    def flush(self) -> str:
        """The rest, however incomplete."""
        return self._tell(len)

    def _tell(self, certain: Callable[[str], int]) -> str:
        text = self._tokenizer.decode_texts(self._window)
        end = max(certain(text), self._told)
        fresh = text[self._told : end]
        self._told = end
        if end == len(text) and len(self._window) >= 2 * _CONTEXT:
            self._window = self._window[-_CONTEXT:]
            self._told = len(self._tokenizer.decode_texts(self._window))
        return fresh

    def _certain(self, text: str) -> int:
        """Length of the window's text without the incomplete character at its end."""
        bytes_at_end = bytearray()
        for id in reversed(self._window[-_LONGEST_CHARACTER:]):
            if (byte := self._tokenizer.byte(id)) is None:
                break
            bytes_at_end.insert(0, byte)
        return len(text) - _incomplete(bytes(bytes_at_end))


def _incomplete(end: bytes) -> int:
    """How many bytes at the end of a text begin a character that is not whole."""
    for count in range(min(len(end), _LONGEST_CHARACTER - 1), 0, -1):
        try:
            codecs.utf_8_decode(end[-count:], "strict", True)
        except UnicodeDecodeError as error:
            if error.start == 0 and error.reason == "unexpected end of data":
                return count
    return 0
