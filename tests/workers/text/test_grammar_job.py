"""Grammars that other processes follow for the leader."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from tests.support.constraints import LocalConstraint
from tests.support.fake_service import ARGUMENTS, MODEL, TOKENIZER
from tests.support.waiting import wait_until
from workers.messages.plan import Sampling
from workers.messages.request import Request
from workers.text.grammar import Grammars, json_schema, regex
from workers.text.grammar_job import Constraints
from workers.text.sandbox import Sandbox

GRAMMARS = Grammars(TOKENIZER, MODEL.vocab_size, MODEL.eos_token)


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    """The leader's."""
    made = Sandbox("workers.text.grammar_job", ARGUMENTS)
    yield made
    made.close()


def _request(grammar: str, resumed: tuple[int, ...] = (), allowed: tuple[int, ...] = ()) -> Request:
    return Request("r", (5,), 20, Sampling(masked=True, allowed_tokens=allowed), grammar=grammar, resumed=resumed)


def _first_allowed(mask: bytes) -> int:
    bits = int.from_bytes(mask, "little")
    return (bits & -bits).bit_length() - 1


def test_masks_are_those_of_the_grammar_also_after_tokens_that_are_resumed(sandbox: Sandbox) -> None:
    constraints = Constraints(sandbox, 4, lambda: None)
    grammar = json_schema('{"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}')
    tokens: list[int] = []
    for _ in range(3):
        request = _request(grammar, tuple(tokens))
        here, there = LocalConstraint(GRAMMARS, request), constraints.open(request)
        assert not there.ready
        for _ in range(4):
            wait_until(lambda: there.ready, 20, pause=0.01)  # noqa: B023
            assert there.mask() == here.mask()
            tokens.append(_first_allowed(here.mask()))
            here.accept(tokens[-1])
            there.accept(tokens[-1])
            constraints.settle(5.0)
            assert there.ready
        there.close()


def test_what_can_not_be_followed_has_a_problem_and_others_go_on(sandbox: Sandbox) -> None:
    constraints = Constraints(sandbox, 4, lambda: None)
    costly = constraints.open(_request(json_schema('{"type": "integer", "multipleOf": 99999989}')))
    stuck = constraints.open(_request(regex("[0-9]{3}"), allowed=(300,)))
    sound = constraints.open(_request(regex("[0-9]{3}")))
    wait_until(lambda: sound.ready and stuck.ready, 20)
    assert not sound.problem
    assert "none of the tokens that may be drawn can follow" in stuck.problem
    wait_until(lambda: costly.ready, 60)
    assert "it takes more than 4 s of a processor" in costly.problem


def test_a_token_that_a_grammar_does_not_allow_is_a_problem(sandbox: Sandbox) -> None:
    constraint = Constraints(sandbox, 4, lambda: None).open(_request(regex("abc"), resumed=(300,)))
    wait_until(lambda: constraint.ready, 20)
    assert constraint.problem


def test_those_for_which_there_is_no_process_wait_for_one_to_be_closed(sandbox: Sandbox) -> None:
    answered = threading.Event()
    constraints = Constraints(sandbox, 1, answered.set)
    first, second, third = (constraints.open(_request(regex("a+"))) for _ in range(3))
    wait_until(lambda: first.ready, 20)
    assert answered.is_set()
    second.close()  # before it had one
    assert not third.ready
    first.close()
    wait_until(lambda: third.ready, 20)
    assert not third.problem
    third.close()
