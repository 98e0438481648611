"""A gateway and a leader of neighbouring releases understand each other, so that they may be replaced one after the other."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.workers.messages import frozen_protocol_1 as frozen
from tests.workers.messages.test_codec import values
from workers.messages import frames
from workers.messages.codec import decode, encode

KINDS = ("Hello", "LeaderInput", "LeaderOutput")


def _common(one: Any, other: Any) -> None:
    """Asserts that what both have is the same."""
    if dataclasses.is_dataclass(one):
        for field in dataclasses.fields(one):
            if hasattr(other, field.name):
                _common(getattr(one, field.name), getattr(other, field.name))
    elif isinstance(one, tuple):
        assert len(one) == len(other)
        for first, second in zip(one, other, strict=True):
            _common(first, second)
    else:
        assert getattr(one, "value", one) == getattr(other, "value", other)


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
def test_what_the_last_release_sends_is_read(kind: str, data: st.DataObject) -> None:
    sent = data.draw(values(getattr(frozen, kind)))
    _common(sent, decode(getattr(frames, kind), encode(sent)))


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
def test_the_last_release_reads_what_is_sent(kind: str, data: st.DataObject) -> None:
    sent = data.draw(values(getattr(frames, kind)))
    _common(decode(getattr(frozen, kind), encode(sent)), sent)


def test_nothing_that_the_last_release_needs_has_gone() -> None:
    """A peer of the last release would take a default for it, or refuse the frame."""
    for name, kind in vars(frozen).items():
        if dataclasses.is_dataclass(kind):
            now = next(vars(module)[name] for module in (frames, *_modules()) if name in vars(module))
            gone = {f.name for f in dataclasses.fields(kind)} - {f.name for f in dataclasses.fields(now)}
            assert not gone, f"{name}: {gone}"


def _modules() -> tuple[Any, ...]:
    from workers.messages import plan, request

    return plan, request
