"""`grokmesh stop`."""

from __future__ import annotations

import argparse

from cluster import daemon
from cluster.commands import access

HELP = "drain and end the service that runs on this machine"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    access.add_arguments(parser)
    parser.add_argument("--forget", action="store_true", help="remove the weights caches of all hosts, too")


def run(arguments: argparse.Namespace) -> int:
    left = daemon.left(arguments.address)
    if left is None:
        daemon.stop(arguments.address, forget=arguments.forget)
    else:  # it goes on without the process that has started it
        from cluster.service import end_left  # Ray takes a second to import

        end_left(left, forget=arguments.forget)
        daemon.clear(arguments.address)
    print(f"the service at {arguments.address} has ended")
    return 0
