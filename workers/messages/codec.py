"""Messages as bytes: MessagePack of their fields, by name. An unknown field is passed over, a missing one has its default."""

from __future__ import annotations

import functools
from typing import Any, TypeVar, cast

import msgspec

_Message = TypeVar("_Message")
_ENCODER = msgspec.msgpack.Encoder()


class CodecError(ValueError):
    """Bytes that are not the message that they should be."""


def encode(message: object) -> bytes:
    """A message, which is one of the dataclasses of this package, as bytes."""
    return _ENCODER.encode(message)


def decode(kind: type[_Message], data: bytes) -> _Message:
    """The message of a kind that `encode` made the bytes of. Raises CodecError."""
    try:
        message: _Message = _decoder(cast(Any, kind)).decode(data)
    except (msgspec.DecodeError, ValueError, RecursionError) as error:
        raise CodecError(f"no {kind.__name__}: {error}") from error
    return message


@functools.cache
def _decoder(kind: Any) -> msgspec.msgpack.Decoder[Any]:
    return msgspec.msgpack.Decoder(kind)
