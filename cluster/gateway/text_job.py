"""What the gateway has done with texts in processes of their own, as their cost is the caller's choice: grammars are tried,
long texts that are no prompts become tokens and the other way round.

Messages to a process: the name of a job, then what it is about. Its answer: JSON that ends with a line end, and the rest of it.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable

from google.protobuf.message import DecodeError

from grok.serving.v1 import generation_pb2
from workers.checkpoint.storage import locate
from workers.text.grammar import GrammarError, Grammars, barring, choice, json_schema, lark, regex, structural_tags
from workers.text.sandbox import JobStream, run_template
from workers.text.tokenizer import Tokenizer

Answer = tuple[dict[str, object], bytes]


class TextJobs:
    """The jobs, by their names. Each takes bytes, and returns a head and more bytes."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_token: int) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._grammars = Grammars(tokenizer, vocab_size, eos_token)
        self.jobs: dict[str, Callable[[bytes], Answer]] = {
            "grammar": self._grammar,
            "Tokenize": self._tokenize,
            "Detokenize": self._detokenize,
            "CountTokens": self._count,
        }

    def run(self, name: str, data: bytes) -> bytes:
        """A job's answer."""
        began = time.process_time()
        try:
            head, body = self.jobs[name](data)
        except (GrammarError, DecodeError, ValueError) as error:
            head, body = {"problem": str(error)}, b""
        return json.dumps({**head, "seconds": time.process_time() - began}).encode() + b"\n" + body

    def _grammar(self, data: bytes) -> Answer:
        """From `{"kind", "source", "allowed", "barred"}` to the grammar, which completions can follow."""
        asked = json.loads(data)
        source = asked["source"]
        make: dict[str | None, Callable[[], str]] = {
            None: lambda: "",
            "json_schema": lambda: json_schema(source),
            "json_object": lambda: json_schema('{"type": "object"}'),
            "regex": lambda: regex(source),
            "choice": lambda: choice(source),
            "grammar": lambda: lark(source),
            "structural_tags": lambda: structural_tags(source),
        }
        grammar = barring(asked["barred"], make[asked["kind"]]())
        self._grammars.check(grammar, asked["allowed"])
        return {}, grammar.encode()

    def _tokenize(self, data: bytes) -> Answer:
        return {}, tokenize(generation_pb2.TokenizeRequest.FromString(data), self._tokenizer).SerializeToString()

    def _detokenize(self, data: bytes) -> Answer:
        request = generation_pb2.DetokenizeRequest.FromString(data)
        return {}, detokenize(request, self._tokenizer, self._vocab_size).SerializeToString()

    def _count(self, data: bytes) -> Answer:
        return {}, count(generation_pb2.CountTokensRequest.FromString(data), self._tokenizer).SerializeToString()


def tokenize(request: generation_pb2.TokenizeRequest, tokenizer: Tokenizer) -> generation_pb2.TokenizeResponse:
    """Tokens of a text."""
    ids = tokenizer.encode(request.text)
    return generation_pb2.TokenizeResponse(ids=ids, pieces=[tokenizer.piece(id) for id in ids])


def detokenize(
    request: generation_pb2.DetokenizeRequest, tokenizer: Tokenizer, vocab_size: int
) -> generation_pb2.DetokenizeResponse:
    """Text of tokens. Raises ValueError for one that is none."""
    outside = next((id for id in request.ids if id >= vocab_size), None)
    if outside is not None:
        raise ValueError(f"has token {outside}; the vocabulary has {vocab_size}")
    return generation_pb2.DetokenizeResponse(text=tokenizer.decode(request.ids))


def count(request: generation_pb2.CountTokensRequest, tokenizer: Tokenizer) -> generation_pb2.CountTokensResponse:
    """Number of tokens of a text."""
    return generation_pb2.CountTokensResponse(tokens=len(tokenizer.encode(request.text)))


def main() -> None:
    """The template of the processes."""
    control, checkpoint, vocab_size, eos_token = sys.argv[1:]
    work = TextJobs(Tokenizer(locate(checkpoint) / "tokenizer.model"), int(vocab_size), int(eos_token))

    def one(stream: JobStream) -> None:
        name = stream.receive().decode()
        stream.send(work.run(name, stream.receive()))

    run_template(int(control), one)


if __name__ == "__main__":
    main()
