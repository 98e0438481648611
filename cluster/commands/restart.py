"""`grokmesh restart`."""

from __future__ import annotations

import argparse

from cluster.commands import access

HELP = "give replicas new worker processes, one after the other"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    access.add_arguments(parser)
    parser.add_argument("--replica", type=int, help="only this one (default: all)")


def run(arguments: argparse.Namespace) -> int:
    with access.client(arguments) as client:
        chosen = [replica.index for replica in client.status().replicas]
        for index in chosen if arguments.replica is None else [arguments.replica]:
            print(f"replica {index}: ready in epoch {client.restart(index)}", flush=True)
    return 0
