"""`grokmesh key`."""

from __future__ import annotations

import argparse
import sys

from cluster.gateway.auth.api_keys import new_key

HELP = "make an API key"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", help="of its owner, as metrics and logs show it")


def run(arguments: argparse.Namespace) -> int:
    key, line = new_key(arguments.name)
    print(f"the key, which is not kept anywhere: {key}", file=sys.stderr)
    print("the line for the file that gateway.api_keys names:", file=sys.stderr)
    print(line)
    return 0
