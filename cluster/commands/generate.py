"""`grokmesh generate`."""

from __future__ import annotations

import argparse
import contextlib
import json
import pathlib
import sys
import time
from collections.abc import Iterator
from typing import Any

import grpc

from cluster.commands import access
from grokmesh import Client, Options, completion_request

HELP = "stream a completion of a prompt"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("prompt", nargs="?", default="")
    parser.add_argument(
        "-i", "--interactive", action="store_true", help="ask for prompts; an empty one goes on with the last text"
    )
    access.add_arguments(parser)
    parser.add_argument("--max-tokens", type=int, help="most tokens to draw (default: what fits the context)")
    parser.add_argument("--temperature", type=float, help="0 takes the most likely token (default: 1)")
    parser.add_argument("--top-p", type=float, help="nucleus, in (0, 1] (default: 1)")
    parser.add_argument("--top-k", type=int, help="only so many likeliest tokens (default: all)")
    parser.add_argument("--seed", type=int, help="for the same tokens again (default: random)")
    parser.add_argument("--stop", action="append", help="text that ends the completion; may be repeated")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json-schema", type=pathlib.Path, help="file with the JSON schema that the completion must fit")
    form.add_argument("--regex", help="expression that the completion must match")
    form.add_argument("--grammar", type=pathlib.Path, help="file with the grammar that the completion must follow")
    form.add_argument("--json-object", action="store_true", default=None, help="the completion must be a JSON object")
    form.add_argument(
        "--structural-tags",
        type=pathlib.Path,
        help="file with a list of tags, whose parts of the text must fit schemas",
    )
    form.add_argument("--choice", action="append", help="text that the completion may be; to be repeated")
    parser.add_argument("--bad-words", action="append", metavar="TEXT", help="that must not come; may be repeated")
    parser.add_argument("--include-stop-text", action="store_true", default=None, help="show it, too")
    parser.add_argument("--stop-token-ids", type=int, nargs="+", metavar="ID", help="tokens that end the completion")
    parser.add_argument("--min-tokens", type=int, help="tokens that there must be before its end (default: 0)")
    parser.add_argument("--ignore-eos", action="store_true", default=None, help="go on past the model's end token")
    parser.add_argument("--priority", type=int, help="from -10 to 10; higher ones go first (default: 0)")
    parser.add_argument("--cache-salt", help="share cached prompts with requests of the same one only")
    parser.add_argument("--timeout", type=float, help="seconds that an attempt of the request may take")


def run(arguments: argparse.Namespace) -> int:
    names = (
        "max_tokens", "temperature", "top_p", "top_k", "seed", "stop", "regex", "choice", "json_object", "bad_words",
        "include_stop_text", "stop_token_ids", "min_tokens", "ignore_eos", "priority", "cache_salt",
    )  # fmt: skip
    options: Options = {name: value for name in names if (value := getattr(arguments, name)) is not None}  # type: ignore[assignment]
    if arguments.json_schema:
        options["json_schema"] = _text(arguments.json_schema)
    if arguments.grammar:
        options["grammar"] = _text(arguments.grammar)
    if not arguments.prompt and not arguments.interactive:
        raise access.UsageError("generate wants a prompt, or -i")
    try:
        if arguments.structural_tags:
            options["structural_tags"] = _tags(arguments.structural_tags)
        completion_request(arguments.prompt, **options)
    except (ValueError, TypeError) as error:  # a number that its field can't hold, or what is no list of tags
        raise access.UsageError(str(error)) from error
    with access.client(arguments) as client:
        if arguments.interactive:
            _converse(client, arguments.prompt, arguments.timeout, options)
        else:
            for _ in _shown(client, arguments.prompt, arguments.timeout, options):
                pass
    return 0


def _text(file: pathlib.Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise access.UsageError(f"{file}: {error}; it must be UTF-8") from error


def _tags(file: pathlib.Path) -> list[dict[str, str]]:
    try:
        tags: list[dict[str, str]] = json.loads(_text(file))
    except json.JSONDecodeError as error:
        raise access.UsageError(f"{file}: {error}; it must be a JSON list of tags") from error
    return tags


def _shown(client: Client, prompt: str, timeout: float | None, options: Options) -> Iterator[str]:
    """The texts of a completion as they come, printed, and at the end how fast they came."""
    began = time.monotonic()
    first, tokens = 0.0, 0
    for part in client.generate(prompt, timeout=timeout, **options):
        first = first or time.monotonic() - began
        tokens += len(part.tokens)
        print(part.text, end="", flush=True)
        yield part.text
        if part.finish_reason:
            print()
            rate = (tokens - 1) / max(time.monotonic() - began - first, 1e-9)
            print(
                f"[{part.finish_reason}] {part.prompt_tokens} prompt tokens, {tokens} tokens at {rate:.1f} tokens/s, "
                f"first after {first * 1000:.0f} ms, seed {part.seed}",
                file=sys.stderr,
            )


def _converse(client: Client, prompt: str, timeout: float | None, options: Options) -> None:
    """Completes what is typed, line by line, until there is no more. An empty line goes on with the last text. Ctrl-C ends a
    completion, or at the prompt everything."""
    with contextlib.suppress(ImportError):  # then lines can't be edited
        import readline  # noqa: F401  # changes what input() does
    text = ""
    while True:
        if prompt or text:
            text = prompt or text
            try:
                for part in _shown(client, text, timeout, options):
                    text += part
            except KeyboardInterrupt:
                print("\n[cancelled]", file=sys.stderr)
            except grpc.RpcError as error:
                call: Any = error  # what stubs raise is a call too
                print(f"{call.code().name}: {call.details()}", file=sys.stderr)
        try:
            prompt = input("> ")
        except (EOFError, KeyboardInterrupt):
            print()
            return
