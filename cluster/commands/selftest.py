"""`grokmesh selftest`."""

from __future__ import annotations

import argparse
import dataclasses
import json
import pathlib
import time

from tools.selftest import sections
from tools.selftest.findings import Finding, Outcome, row, summary
from workers.messages.specs import PLATFORMS

HELP = "say whether devices, kernels and storage are right, and as fast as expected; exit code 1 if something is wrong"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--ray",
        metavar="ADDRESS",
        help="test all hosts of this Ray cluster, such as auto, at once (default: this host); paths are those of each host",
    )
    parser.add_argument(
        "--platform",
        choices=PLATFORMS,
        help="of the devices (default: what is there)",
    )
    parser.add_argument("--devices", type=int, default=1, help="parts of each CPU host (default: %(default)s)")
    parser.add_argument("--checkpoint", help="directory or URL from which the rate of loading is measured")
    parser.add_argument(
        "--golden", default=str(sections.GOLDEN), help="directory of golden sets (default: those of the project)"
    )
    parser.add_argument("--config", help="config.json of the model whose layers are computed (default: Grok-1)")
    parser.add_argument(
        "--only", choices=sections.SECTIONS, nargs="+", default=sections.SECTIONS, help="these sections (default: all)"
    )
    parser.add_argument("--json", type=pathlib.Path, help="file for all findings")


def run(arguments: argparse.Namespace) -> int:
    began = time.perf_counter()

    def options_of(platform: str) -> sections.Options:
        a = arguments
        return sections.Options(platform, a.devices, a.checkpoint, a.golden, a.config, tuple(a.only))

    found: dict[str, list[Finding]] = {}
    if arguments.ray:
        from cluster.commands.selftest_hosts import test_hosts

        for host, findings in test_hosts(arguments.ray, options_of, arguments.platform):
            print(host, *map(row, findings), sep="\n", flush=True)
            found.setdefault(host, []).extend(findings)
    else:
        for finding in sections.run_sections(options_of(arguments.platform or sections.platform_here())):
            print(row(finding), flush=True)
            found.setdefault("this host", []).append(finding)
    everything = [finding for findings in found.values() for finding in findings]
    seconds = time.perf_counter() - began
    print(summary(everything, seconds))
    if arguments.json:
        hosts = {host: [dataclasses.asdict(finding) for finding in findings] for host, findings in found.items()}
        arguments.json.write_text(json.dumps({"seconds": seconds, "hosts": hosts}, indent=1) + "\n")
    return 1 if any(finding.outcome is Outcome.FAILED for finding in everything) else 0
