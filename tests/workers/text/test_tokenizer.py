"""Streaming text token by token gives the text that decoding all at once gives."""

from __future__ import annotations

import pathlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.conftest import DEMO
from workers.text.tokenizer import Detokenizer, Tokenizer, TokenizerError

TOKENIZER = Tokenizer(DEMO / "tokenizer.model")
RELEASE = pathlib.Path(__file__).parents[4] / "shared" / "data" / "tokenizer.model"


def _stream(tokenizer: Tokenizer, prompt: list[int], completion: list[int]) -> str:
    detokenizer = Detokenizer(tokenizer, prompt)
    return "".join([detokenizer.push(token) for token in completion]) + detokenizer.flush()


@given(st.text(min_size=1, max_size=60), st.integers(0, 40))
def test_the_pieces_of_any_text_join_to_it(text: str, split: int) -> None:
    ids = TOKENIZER.encode(text)
    prompt, completion = ids[:split], ids[split:]
    whole, before = TOKENIZER.decode(ids), TOKENIZER.decode(prompt)
    # What an incomplete character at the prompt's end stands for comes with the completion.
    before = before.rstrip("\N{REPLACEMENT CHARACTER}")
    assert _stream(TOKENIZER, prompt, completion) == whole[len(before) :]


@given(st.lists(st.integers(0, TOKENIZER.vocab_size - 1), max_size=60))
def test_any_tokens_can_be_streamed(ids: list[int]) -> None:
    assert _stream(TOKENIZER, [], ids) == TOKENIZER.decode(ids)


def test_a_replacement_character_of_the_text_itself_is_no_incomplete_one() -> None:
    text = "\N{REPLACEMENT CHARACTER}" * 3 + "é!"
    prompt = TOKENIZER.encode("x")
    assert _stream(TOKENIZER, prompt, TOKENIZER.encode("x" + text)[len(prompt) :]) == text


def test_a_character_of_several_tokens_is_shown_whole() -> None:
    ids = TOKENIZER.encode("\N{GRINNING FACE}")
    detokenizer = Detokenizer(TOKENIZER, TOKENIZER.encode("x"))
    shown = [detokenizer.push(token) for token in ids[-4:]]
    assert shown == ["", "", "", "\N{GRINNING FACE}"]


def test_a_space_before_the_first_word_is_kept() -> None:
    prompt, both = TOKENIZER.encode("In the beginning"), TOKENIZER.encode("In the beginning God")
    assert both[: len(prompt)] == prompt
    assert _stream(TOKENIZER, prompt, both[len(prompt) :]) == " God"


def test_no_tokenizer_is_explained(tmp_path: pathlib.Path) -> None:
    with pytest.raises(TokenizerError, match="no such file"):
        Tokenizer(tmp_path / "tokenizer.model")
    (tmp_path / "tokenizer.model").write_bytes(b"nonsense")
    with pytest.raises(TokenizerError, match="no SentencePiece model"):
        Tokenizer(tmp_path / "tokenizer.model")


@pytest.mark.skipif(not RELEASE.exists(), reason="Grok-1's tokenizer is not part of the project")
def test_the_release_tokenizer_streams_too() -> None:
    tokenizer = Tokenizer(RELEASE)
    assert tokenizer.vocab_size == 131_072
    ids = tokenizer.encode("Grüße aus 東京, \N{GRINNING FACE} and a long tail of plain words.")
    assert _stream(tokenizer, ids[:3], ids[3:]) == tokenizer.decode(ids)[len(tokenizer.decode(ids[:3])) :]


def test_a_window_does_not_grow_with_tokens_that_have_no_text() -> None:
    detokenizer = Detokenizer(TOKENIZER, TOKENIZER.encode("And"))
    shown = [detokenizer.push(2) for _ in range(1000)]
    assert set(shown) == {""}
    assert len(detokenizer._window) < 50
    assert detokenizer.push(TOKENIZER.encode("And he")[1]) == " he"
