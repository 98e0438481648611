"""`grokmesh cancel`."""

from __future__ import annotations

import argparse

from cluster.commands import access

HELP = "end completions by the names that logs and responses give their requests"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("request_id", nargs="+")
    access.add_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    with access.client(arguments) as client:
        for request_id in arguments.request_id:
            client.cancel(request_id)
    return 0
