"""`grokmesh health`."""

from __future__ import annotations

import argparse

from cluster.commands import access

HELP = "say whether the service serves; exit code 1 if it does not"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    access.add_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    with access.client(arguments, attempts=1) as client:
        serving = client.serving(timeout=5)
    print("serving" if serving else "not serving")
    return 0 if serving else 1
