"""`grokmesh bench serve`."""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
import pathlib
import sys

from cluster.commands import access
from tools.bench.service_load import Lengths, Load, run_load
from tools.bench.service_report import Objective, plot, summarize, table

HELP = "send a load and report latencies, throughput and goodput"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    access.add_arguments(parser)
    parser.add_argument("--requests", type=int, default=200, help="in all (default: %(default)s)")
    parser.add_argument("--clients", type=int, default=16, help="requests at once, at most (default: %(default)s)")
    parser.add_argument("--rate", type=float, help="arrivals a second, a Poisson process (default: a closed loop)")
    parser.add_argument("--ramp", type=float, default=0.0, help="seconds until all clients, or the rate, are reached")
    parser.add_argument("--prompt", default="128", help="tokens, or least and greatest: 64:256 (default: %(default)s)")
    parser.add_argument("--completion", default="64", help="tokens, likewise (default: %(default)s)")
    parser.add_argument(
        "--shared-prefix", type=int, default=0, help="tokens that all prompts begin with (default: none)"
    )
    parser.add_argument("--temperature", type=float, default=1.0, help="of the draws (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of lengths, prompts and arrivals (default: %(default)s)")
    parser.add_argument(
        "--slo-first-token", type=float, default=1.0, help="seconds, for goodput (default: %(default)s)"
    )
    parser.add_argument(
        "--slo-token", type=float, default=0.2, help="seconds a token, for goodput (default: %(default)s)"
    )
    parser.add_argument("--output", type=pathlib.Path, help="folder for bench.json and bench.png")


def run(arguments: argparse.Namespace) -> int:
    try:
        prompt, completion = Lengths.parse(arguments.prompt), Lengths.parse(arguments.completion)
    except ValueError as error:
        raise access.UsageError(str(error)) from error
    load = Load(
        arguments.requests, arguments.clients, arguments.rate, arguments.ramp, prompt, completion,
        arguments.shared_prefix, arguments.temperature, arguments.seed,
    )  # fmt: skip
    samples = asyncio.run(run_load(arguments.address, load, **access.options(arguments)))
    summary = summarize(samples, Objective(arguments.slo_first_token, arguments.slo_token))
    print(table(summary))
    if arguments.output:
        arguments.output.mkdir(parents=True, exist_ok=True)
        shown = {"load": dataclasses.asdict(load), "summary": summary}
        (arguments.output / "bench.json").write_text(json.dumps(shown, indent=1))
        try:
            plot(samples, arguments.output / "bench.png")
        except ImportError as error:
            print(f"no picture: {error}; pip install 'grokmesh[bench]' brings matplotlib", file=sys.stderr)
    return 1 if summary["errors"] else 0
