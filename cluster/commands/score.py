"""`grokmesh score`."""

from __future__ import annotations

import argparse
import math

from cluster.commands import access

HELP = "say how probable the model finds a text, or each of some continuations of it"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("text")
    parser.add_argument("continuations", nargs="*", help="are scored behind the text (default: the text itself is)")
    access.add_arguments(parser)
    parser.add_argument("--timeout", type=float, help="seconds that an attempt of the request may take")


def run(arguments: argparse.Namespace) -> int:
    with access.client(arguments) as client:
        texts = client.score(arguments.text, arguments.continuations, timeout=arguments.timeout)
        print("logprob  tokens  perplexity  greedy  text")
        for text, source in zip(texts, arguments.continuations or [arguments.text], strict=True):
            scored = [token for token in text.tokens if token.logprob is not None]
            perplexity = math.exp(min(-text.logprob / len(scored), 700.0))
            greedy = "yes" if text.greedy else "no"
            print(f"{text.logprob:7.2f}  {len(scored):6}  {perplexity:10.2f}  {greedy:6}  {source!r}")
    return 0
