"""Masks allow exactly what a grammar's texts can go on with."""

from __future__ import annotations

import json
import random

import pytest

from tests.conftest import DEMO
from workers.text.grammar import (
    GrammarError,
    Grammars,
    Matcher,
    barring,
    choice,
    json_schema,
    lark,
    regex,
    structural_tags,
)
from workers.text.tokenizer import Tokenizer

TOKENIZER = Tokenizer(DEMO / "tokenizer.model")
EOS = 2
GRAMMARS = Grammars(TOKENIZER, TOKENIZER.vocab_size, EOS)


def _allowed(matcher: Matcher) -> set[int]:
    mask = matcher.mask()
    assert len(mask) == TOKENIZER.vocab_size // 8
    return {id for id in range(TOKENIZER.vocab_size) if mask[id // 8] >> (id % 8) & 1}


def _drawn(matcher: Matcher, rng: random.Random, longest: int) -> bytes:
    """What a completion spells of tokens drawn at random among those that are allowed."""
    text = b""
    for _ in range(longest):
        id = rng.choice(sorted(_allowed(matcher)))
        matcher.accept(id)
        text += TOKENIZER.spelled(id) or b""
    return text


def _texts(matcher: Matcher, longest: int) -> list[str]:
    """What a completion spells that always takes the first token that is allowed."""
    ids: list[int] = []
    while len(ids) < longest:
        id = min(_allowed(matcher))
        matcher.accept(id)
        if id == EOS:
            break
        ids.append(id)
    return [b"".join(TOKENIZER.spelled(id) or b"" for id in ids).decode()]


def test_a_regex_allows_the_tokens_that_go_on_with_it() -> None:
    matcher = GRAMMARS.matcher(regex("[ab]c"))
    first = {TOKENIZER.spelled(id) for id in _allowed(matcher)}
    assert first <= {b"a", b"b", b"ac", b"bc"}
    assert {b"a", b"b"} <= first
    matcher.accept(next(id for id in _allowed(matcher) if TOKENIZER.spelled(id) == b"a"))
    assert {TOKENIZER.spelled(id) for id in _allowed(matcher)} == {b"c"}


def test_where_only_one_text_can_follow_it_is_spelled_by_the_models_own_pieces() -> None:
    matcher = GRAMMARS.matcher(regex("a+"))
    (first,) = _allowed(matcher)
    assert TOKENIZER.spelled(first) == b"a"
    assert TOKENIZER.byte(first) is None


def test_after_the_end_only_the_end_token_is_allowed() -> None:
    matcher = GRAMMARS.matcher(choice(["x"]))
    matcher.accept(next(iter(_allowed(matcher))))
    assert _allowed(matcher) == {EOS}
    matcher.accept(EOS)
    assert _allowed(matcher) == {EOS}


def test_after_a_token_that_was_not_allowed_nothing_follows() -> None:
    matcher = GRAMMARS.matcher(regex("abc"))
    matcher.accept(next(id for id in range(300, 400) if id not in _allowed(matcher)))
    with pytest.raises(GrammarError):
        matcher.mask()


def test_a_schema_is_kept_whatever_is_drawn() -> None:
    schema = {
        "type": "object",
        "properties": {"n": {"type": "integer"}},
        "required": ["n"],
        "additionalProperties": False,
    }
    (text,) = _texts(GRAMMARS.matcher(json_schema(json.dumps(schema))), 40)
    assert text.startswith('{"n":')


@pytest.mark.parametrize(
    ("grammar", "reason"),
    [
        (regex("(["), "unclosed character class"),
        (regex("(?=a)b"), "look"),
        (json_schema('{"type": "foo"}'), "Invalid type"),
        (json_schema('{"$ref": "http://elsewhere/schema"}'), "does not fetch"),
    ],
)
def test_what_no_completion_can_follow_is_refused_with_a_reason(grammar: str, reason: str) -> None:
    with pytest.raises(GrammarError, match=reason):
        GRAMMARS.check(grammar)


@pytest.mark.parametrize("make", [lambda: json_schema("{"), lambda: json_schema("3"), lambda: choice([])])
def test_what_is_no_grammar_at_all_is_refused(make: object) -> None:
    with pytest.raises(GrammarError):
        make()  # type: ignore[operator]


@pytest.mark.parametrize(
    ("schema", "reason"),
    [
        ("false", "allows no value"),
        ('{"const": NaN}', "NaN is no number of JSON"),
        ('{"maximum": 1e400}', "1e400 is too large"),
        ('{"const": "\\ud800"}', "is no JSON that can be followed"),
        ('{"properties": {"a": ' * 130 + "{}" + "}}" * 130, "recursion limit"),
        ('{"const": 9007199254740993}', "is not kept exactly"),
        ('{"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 0.5}', "can't be kept"),
        ('{"type": "number", "minimum": -1.5, "exclusiveMaximum": -1}', "can't be kept"),
    ],
)
def test_schemas_that_would_not_be_kept_are_refused(schema: str, reason: str) -> None:
    with pytest.raises(GrammarError, match=reason):
        json_schema(schema)


def test_a_schema_that_allows_anything_is_followed() -> None:
    GRAMMARS.check(json_schema("true"))


@pytest.mark.parametrize("count", [499, 1900])
def test_large_objects_and_choices_are_followed(count: int) -> None:
    GRAMMARS.check(json_schema(json.dumps({"type": "object", "properties": {f"p{i:04d}": {} for i in range(count)}})))
    GRAMMARS.check(choice([f"choice number {i}" for i in range(count)]))


def test_only_tokens_that_the_caller_allows_follow_and_at_the_end_the_end_token() -> None:
    digits = {id for id in range(TOKENIZER.vocab_size) if (TOKENIZER.spelled(id) or b"").isdigit()}
    matcher = GRAMMARS.matcher(regex("[0-9]{3}"), sorted(digits)[:4])
    for _ in range(3):
        assert _allowed(matcher) <= set(sorted(digits)[:4])
        matcher.accept(min(_allowed(matcher)))
    assert _allowed(matcher) == {EOS}
    with pytest.raises(GrammarError, match="none of the tokens that may be drawn can follow"):
        GRAMMARS.check(regex("[0-9]{3}"), [300])


def test_problems_are_short() -> None:
    with pytest.raises(GrammarError) as raised:
        GRAMMARS.check(regex("a" * 983 + "("))
    assert len(str(raised.value)) < 300
    assert "invalid regex" in str(raised.value)


def test_what_is_barred_never_comes_however_tokens_spell_it() -> None:
    rng = random.Random(0)
    barred = ["e", " t", "ab", "\N{SNOWMAN}", "aba"]
    for _ in range(5):
        text = _drawn(GRAMMARS.matcher(barring(barred, "")), rng, 200)
        assert not any(word.encode() in text for word in barred)
    written = GRAMMARS.matcher(barring(["the"], ""))
    free = _allowed(written)
    assert {TOKENIZER.spelled(id) for id in set(range(TOKENIZER.vocab_size)) - free} >= {b" the", b" them"}
    assert EOS in free
    written.accept(next(id for id in free if TOKENIZER.spelled(id) == b"t"))
    written.accept(next(id for id in free if TOKENIZER.spelled(id) == b"h"))
    assert b"e" in {TOKENIZER.spelled(id) for id in free - _allowed(written)}


def test_a_grammar_goes_on_without_what_is_barred() -> None:
    matcher = GRAMMARS.matcher(barring(["b"], regex("(a|b)c")))
    assert {TOKENIZER.spelled(id) for id in _allowed(matcher)} <= {b"a", b"ac"}
    with pytest.raises(GrammarError, match="can follow"):
        GRAMMARS.check(barring(["x"], choice(["axe"])))
    with pytest.raises(GrammarError, match="none of them empty"):
        barring([""], "")


def test_a_grammar_in_larks_notation_is_followed() -> None:
    grammar = lark('start: "(" start ")" | "x"')
    GRAMMARS.check(grammar)
    matcher = GRAMMARS.matcher(grammar)
    for text in (b"(", b"x", b")"):
        matcher.accept(next(id for id in _allowed(matcher) if TOKENIZER.spelled(id) == text))
    assert _allowed(matcher) == {EOS}
    with pytest.raises(GrammarError):
        GRAMMARS.check(lark("start: nowhere"))


def test_only_what_a_tag_begins_must_fit_its_schema() -> None:
    schema = json.dumps({"type": "object", "properties": {"n": {"const": 7}}, "required": ["n"]})
    tag = {"trigger": "<f", "begin": "<f>", "json_schema": schema, "end": "</f>"}
    grammar = structural_tags([tag])
    GRAMMARS.check(grammar)
    matcher = GRAMMARS.matcher(grammar)
    spelled: dict[bytes | None, int] = {TOKENIZER.spelled(id): id for id in range(TOKENIZER.vocab_size)}
    for byte in b"So <f":
        matcher.accept(spelled[bytes([byte])])
    for byte in b'>{"n":7}</f>':
        assert [TOKENIZER.spelled(id) for id in _allowed(matcher) if bytes([byte]) == TOKENIZER.spelled(id)]
        assert b"Q" not in {TOKENIZER.spelled(id) for id in _allowed(matcher)}
        matcher.accept(spelled[bytes([byte])])
    assert spelled[b"Q"] in _allowed(matcher)
    with pytest.raises(GrammarError, match="does not begin with its trigger"):
        structural_tags([{**tag, "trigger": "<g"}])
    with pytest.raises(GrammarError, match="must have tags"):
        structural_tags([])
