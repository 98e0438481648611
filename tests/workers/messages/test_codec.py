"""Whatever the streams carry arrives as it was sent, whichever fields it has; an older or newer peer is understood."""

from __future__ import annotations

import dataclasses
import enum
import functools
import math
import typing
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from workers.messages.codec import CodecError, decode, encode
from workers.messages.frames import Done, Hello, LeaderInput, LeaderOutput, PlanFrame
from workers.messages.plan import Token
from workers.messages.request import Load

FRAMES = (Hello, PlanFrame, Done, LeaderInput, LeaderOutput)
_SIMPLE: dict[Any, st.SearchStrategy[Any]] = {
    int: st.integers(-(2**63), 2**64 - 1), float: st.floats(allow_nan=False), str: st.text(max_size=9),
    bytes: st.binary(max_size=9), bool: st.booleans(), type(None): st.none(),
}  # fmt: skip


@functools.cache
def values(hint: Any) -> st.SearchStrategy[Any]:
    """Values of a type; of a dataclass, each of its fields has any."""
    if hint in _SIMPLE:
        return _SIMPLE[hint]
    if dataclasses.is_dataclass(hint):
        hints = typing.get_type_hints(hint)
        return st.builds(hint, **{field.name: values(hints[field.name]) for field in dataclasses.fields(hint)})  # type: ignore[arg-type]
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return st.sampled_from(hint)
    if isinstance(hint, type) and issubclass(hint, tuple):  # a NamedTuple
        return st.builds(hint, *map(values, typing.get_type_hints(hint).values()))
    kind, parts = typing.get_origin(hint), typing.get_args(hint)
    if kind is tuple and parts[1:] == (...,):
        return st.lists(values(parts[0]), max_size=2).map(tuple)
    if kind is tuple:
        return st.tuples(*map(values, parts))
    if kind is frozenset:
        return st.frozensets(values(parts[0]), max_size=2)
    return st.one_of(*map(values, parts))  # a union


@pytest.mark.parametrize("kind", FRAMES)
@given(data=st.data())
def test_a_frame_arrives_as_it_was_sent(kind: type, data: st.DataObject) -> None:
    frame = data.draw(values(kind))
    assert decode(kind, encode(frame)) == frame


def test_a_token_without_a_probability_arrives_as_one() -> None:
    assert math.isnan(decode(Token, encode(Token(5, math.nan))).logprob)


def test_a_field_that_is_not_known_is_passed_over_and_one_that_is_missing_has_its_default() -> None:
    fields = msgspec.msgpack.decode(encode(Load(slots=4, running=2)))
    del fields["pages_cached"]
    fields["of_a_later_release"] = {"any": ["thing"]}
    assert decode(Load, msgspec.msgpack.encode(fields)) == Load(slots=4, running=2)


@pytest.mark.parametrize(
    "data",
    [b"", b"\xc1", b"\x80", encode(Hello(1, b"s"))[:-1], encode({"epoch": "1", "secret": b""}), b"\x91" * 100_000],
)
def test_what_is_no_hello_is_an_error(data: bytes) -> None:
    with pytest.raises(CodecError, match="no Hello: "):
        decode(Hello, data)
