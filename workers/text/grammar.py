"""Which tokens may come next in a completion that follows a JSON schema, a regular expression or another grammar, or must not
hold some texts.

Grammars are llguidance's work. Of the kept libraries it alone has no dependencies, takes all kinds and needs no index over the
vocabulary beforehand: xgrammar brings PyTorch, outlines-core knows regular expressions only.
"""

from __future__ import annotations

import bisect
import copy
import itertools
import json
import math
import random
import time
from collections.abc import Collection, Iterable, Sequence
from typing import Any

from llguidance import LLMatcher, LLParserLimits, LLTokenizer, StructTag, TokenizerWrapper

from workers.text.tokenizer import Tokenizer

#: Bytes of a schema, an expression or a choice.
MAX_SOURCE = 64 * 1024
#: llguidance's own limits. Its defaults refuse objects of 499 optional properties after their first token.
_LIMITS = LLParserLimits(max_items_in_row=50_000, step_max_items=200_000, verbose_errors=False)
#: A grammar is tried by completions drawn at random: so many, of so many tokens, for so many seconds of a processor.
_TRIALS, _TRIAL_TOKENS, _TRIAL_SECONDS = 4, 24, 0.1
#: Begins what `barring` makes.
_BARRING = "%barring "
#: Whole numbers beyond these may be rounded.
_EXACT_INTEGERS = 2**53
#: Longest problem that is reported; llguidance repeats whole grammars.
_LONGEST_PROBLEM = 240


class GrammarError(ValueError):
    """A schema, expression or choice that can't be followed."""

    def __init__(self, problem: str) -> None:
        line = " ".join(problem.split("<state>")[0].split())
        super().__init__(line if len(line) <= _LONGEST_PROBLEM else f"{line[:_LONGEST_PROBLEM]}...")


def json_schema(schema: str) -> str:
    """The grammar of the JSON values that a schema describes. Raises GrammarError."""
    try:
        parsed = json.loads(schema, parse_constant=_no_number, parse_float=_number)
    except (ValueError, RecursionError) as error:
        raise GrammarError(f"is no JSON: {error}") from error
    if parsed is False:
        raise GrammarError("allows no value at all")
    if parsed is True:
        schema = "{}"
    elif not isinstance(parsed, dict):
        raise GrammarError("must be a JSON object or a boolean")
    _check_numbers(parsed)
    try:
        # Without spaces and line ends, which a model may go on with for ever.
        return str(LLMatcher.grammar_from_json_schema(schema, defaults={"whitespace_flexible": False}))
    except ValueError as error:  # what Python takes for JSON and llguidance does not
        raise GrammarError(f"is no JSON that can be followed: {error}") from error


def regex(expression: str) -> str:
    """The grammar of the texts that match an expression from beginning to end."""
    return str(LLMatcher.grammar_from_regex(expression))


def lark(source: str) -> str:
    """The grammar that is written down in Lark's notation."""
    return str(LLMatcher.grammar_from_lark(source))


def choice(texts: Sequence[str]) -> str:
    """The grammar of exactly these texts. Raises GrammarError."""
    if not texts or not all(texts):
        raise GrammarError("must have texts, none of them empty")
    return str(LLMatcher.grammar_from_lark("start: " + " | ".join(json.dumps(text) for text in texts)))


def structural_tags(tags: Sequence[dict[str, str]]) -> str:
    """The grammar of texts of which parts fit schemas, each given by `trigger`, `begin`, `json_schema` and `end`.

    Raises GrammarError.
    """
    made = []
    for tag in tags:
        if not tag["trigger"] or not tag["begin"].startswith(tag["trigger"]):
            raise GrammarError(
                f"has a tag whose begin {tag['begin']!r} does not begin with its trigger {tag['trigger']!r}"
            )
        json_schema(tag["json_schema"])
        schema = json.loads(tag["json_schema"])
        schema = {"x-guidance": {"whitespace_flexible": False}, **(schema if isinstance(schema, dict) else {})}
        made.append(StructTag(trigger=tag["trigger"], begin=tag["begin"], grammar=schema, end=tag["end"]))
    if not made:
        raise GrammarError("must have tags")
    return StructTag.to_grammar(made, assume_special=False)


def barring(texts: Sequence[str], grammar: str) -> str:
    """A grammar, or any text if it is empty, without these texts anywhere. Raises GrammarError."""
    if not all(texts):
        raise GrammarError("must be texts, none of them empty")
    return f"{_BARRING}{json.dumps(list(texts))}\n{grammar}" if texts else grammar


def _check_numbers(schema: Any) -> None:
    """Raises GrammarError for numbers with which llguidance allows other values than the schema does."""
    nodes = [schema]
    while nodes:
        node = nodes.pop()
        if isinstance(node, int) and abs(node) > _EXACT_INTEGERS and int(float(node)) != node:
            raise GrammarError(f"has the number {str(node)[:40]}, which is not kept exactly; use a string or a range")
        if isinstance(node, list):
            nodes += node
        elif isinstance(node, dict):
            nodes += node.values()
            _check_bounds(node)


def _check_bounds(node: dict[str, Any]) -> None:
    """Raises GrammarError for a bound that would itself be allowed though it is excluded: a whole number with less than one to
    the other bound."""
    for excluded, others in (
        ("exclusiveMinimum", ("maximum", "exclusiveMaximum")),
        ("exclusiveMaximum", ("minimum", "exclusiveMinimum")),
    ):
        bound = node.get(excluded)
        if node.get("type") == "integer" or not isinstance(bound, int | float) or bound != int(bound):
            continue
        for other in others:
            if isinstance(node.get(other), int | float) and abs(node[other] - bound) < 1:
                raise GrammarError(f"{excluded}={bound} with {other}={node[other]} can't be kept; move one of them")


def _no_number(name: str) -> Any:
    raise ValueError(f"{name} is no number of JSON")


def _number(digits: str) -> float:
    if math.isinf(number := float(digits)):
        raise ValueError(f"{digits} is too large")
    return number


class Grammars:
    """Grammars over one tokenizer's tokens."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_token: int) -> None:
        self._eos = eos_token
        self._vocab_size = vocab_size
        pieces = [tokenizer.spelled(id) for id in range(vocab_size)]
        self._tokenizer = LLTokenizer(TokenizerWrapper(_Pieces(pieces, eos_token)), n_vocab=vocab_size)
        self._spelling = Spelling(pieces)

    def check(self, grammar: str, allowed: Collection[int] = ()) -> None:
        """Raises GrammarError if no completion can follow `grammar` with the tokens `allowed`, or if one of some that are drawn
        at random gets into a state from which nothing follows."""
        followed = _parts(grammar)[1]
        problem = LLMatcher.validate_grammar(followed, self._tokenizer) if followed else ""
        if problem:
            raise GrammarError(str(problem))
        rng, began, start = random.Random(0), time.process_time(), self.matcher(grammar, allowed)
        for _ in range(_TRIALS):
            matcher = start.copy()
            for _ in range(_TRIAL_TOKENS):
                mask = int.from_bytes(matcher.mask(), "little") & ~(1 << self._eos)
                if not mask or time.process_time() - began > _TRIAL_SECONDS:
                    break
                matcher.accept(_one_bit(mask, rng))

    def matcher(self, grammar: str, allowed: Collection[int] = ()) -> Matcher:
        """Follows one completion of the tokens `allowed`; all are if there are none."""
        texts, followed = _parts(grammar)
        matcher = LLMatcher(self._tokenizer, followed, log_level=0, limits=_LIMITS) if followed else None
        barred = BarredTexts([text.encode() for text in texts], self._spelling)
        return Matcher(matcher, self._vocab_size, self._eos, allowed, barred)


def _parts(grammar: str) -> tuple[list[str], str]:
    """What must not be there, and the grammar that is left; see `barring`."""
    if not grammar.startswith(_BARRING):
        return [], grammar
    head, _, rest = grammar.removeprefix(_BARRING).partition("\n")
    return json.loads(head), rest


def _one_bit(mask: int, rng: random.Random) -> int:
    """The place of one of the bits that are set."""
    above = mask >> (start := rng.randrange(mask.bit_length()))
    if above:
        return start + (above & -above).bit_length() - 1
    return (mask & -mask).bit_length() - 1


class Matcher:
    """Which tokens a completion may go on with. Once the grammar allows nothing more, that is the end token alone."""

    def __init__(
        self, matcher: LLMatcher | None, vocab_size: int, eos_token: int, allowed: Collection[int], barred: BarredTexts
    ) -> None:
        self._matcher = matcher
        self._barred = barred
        self._size = -(-vocab_size // 32) * 4
        self._only_eos = (1 << eos_token).to_bytes(self._size, "little")
        ends = {eos_token} if matcher is not None else set()
        self._allowed = sum(1 << token for token in {*allowed, *ends}) if allowed else (1 << vocab_size) - 1

    def copy(self) -> Matcher:
        """Another one in the same state."""
        twin = copy.copy(self)
        twin._matcher = self._matcher and self._matcher.deep_copy()
        twin._barred = copy.copy(self._barred)
        return twin

    def mask(self) -> bytes:
        """A bit for each token, in little-endian words of 32; at least one is set. Raises GrammarError where nothing may
        follow."""
        matcher, tokens = self._matcher, self._allowed & ~self._barred.tokens()
        if matcher is not None:
            if matcher.is_stopped() and not matcher.is_error():
                return self._only_eos
            tokens &= int.from_bytes(bytes(matcher.compute_bitmask())[: self._size], "little")
            if matcher.is_error():
                raise GrammarError(str(matcher.get_error()))
            if not tokens and matcher.is_accepting():
                return self._only_eos
        if not tokens:
            raise GrammarError("none of the tokens that may be drawn can follow")
        return tokens.to_bytes(self._size, "little")

    def accept(self, token: int) -> None:
        if self._matcher is not None:
            self._matcher.consume_token(token)
        self._barred.accept(token)


class Spelling:
    """Tokens by the bytes that they spell. Sets of tokens are numbers with a bit for each."""

    def __init__(self, pieces: Sequence[bytes | None]) -> None:
        self.pieces = pieces
        self._sorted = sorted((piece, id) for id, piece in enumerate(pieces) if piece)

    def beginning(self, text: bytes) -> int:
        """The tokens that begin with a text."""
        first = bisect.bisect_left(self._sorted, (text, 0))
        following = itertools.islice(self._sorted, first, None)
        return self._set(id for _, id in itertools.takewhile(lambda entry: entry[0].startswith(text), following))

    def holding(self, text: bytes) -> int:
        """The tokens that hold a text anywhere."""
        return self._set(id for piece, id in self._sorted if text in piece)

    def _set(self, ids: Iterable[int]) -> int:
        bits = bytearray(len(self.pieces) // 8 + 1)
        for id in ids:
            bits[id // 8] |= 1 << id % 8
        return int.from_bytes(bits, "little")


class BarredTexts:
    """Which tokens would complete one of some texts in what has been written."""

    def __init__(self, texts: Sequence[bytes], spelling: Spelling) -> None:
        self._spelling = spelling
        #: Of each text and each part of it that may have been written: the tokens that complete it.
        self._completing = [
            (text[:count], spelling.beginning(text[count:]) if count else spelling.holding(text))
            for text in texts
            for count in range(len(text))
        ]
        self._kept = max(map(len, texts), default=1) - 1
        self._written = b""

    def tokens(self) -> int:
        """Those that must not come next."""
        barred = 0
        for written, completing in self._completing:
            if self._written.endswith(written):
                barred |= completing
        return barred

    def accept(self, token: int) -> None:
        written = self._written + (self._spelling.pieces[token] or b"")
        self._written = written[max(len(written) - self._kept, 0) :]


class _Pieces:
    """What llguidance asks of a tokenizer."""

    def __init__(self, pieces: list[bytes | None], eos_token: int) -> None:
        # Of tokens that spell the same the last, which is the model's own piece: those of single bytes come first.
        self._ids = {piece: id for id, piece in enumerate(pieces) if piece}
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
