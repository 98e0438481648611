"""`grokmesh batch`."""

from __future__ import annotations

import argparse
import asyncio
import os
import pathlib
import ssl
import sys

from cluster.commands.access import API_KEY_VARIABLE

HELP = "answer a file of requests in OpenAI's batch format; run again, it goes on where it was"
DEFAULT_URL = "http://127.0.0.1:8000"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("requests", type=pathlib.Path, help="file of lines with custom_id, url and body")
    parser.add_argument("results", type=pathlib.Path, help="file that gets a line for each of them")
    parser.add_argument("--url", default=DEFAULT_URL, help="of the service's HTTP interface (default: %(default)s)")
    parser.add_argument("--at-once", type=int, default=16, help="requests at a time (default: %(default)s)")
    parser.add_argument(
        "--priority", type=int, default=-1, help="of requests whose bodies name none (default: %(default)s)"
    )
    parser.add_argument(
        "--patience",
        type=float,
        default=600.0,
        help="seconds without any answer after which it gives up (default: 600)",
    )
    parser.add_argument("--tls-ca", type=pathlib.Path, help="PEM file of the authority that signed its certificate")


def run(arguments: argparse.Namespace) -> int:
    import tqdm  # these take longer than other commands do in all

    from cluster.batch import Batch, open_results, read_requests

    lines = read_requests(arguments.requests)
    tls = ssl.create_default_context(cafile=arguments.tls_ca) if arguments.tls_ca else None
    batch = Batch(arguments.url, os.environ.get(API_KEY_VARIABLE), tls, arguments.priority, arguments.patience)
    failed = 0
    with (
        open_results(arguments.results) as results,
        tqdm.tqdm(total=len(lines), initial=sum(line.name in results.done for line in lines), unit=" requests") as bar,
    ):

        def answered(succeeded: bool) -> None:
            nonlocal failed
            failed += not succeeded
            bar.update()

        asyncio.run(batch.run(lines, results, max(arguments.at_once, 1), answered))
    if failed:
        print(f"{failed} requests failed; {arguments.results} says why", file=sys.stderr)
    return 1 if failed else 0
