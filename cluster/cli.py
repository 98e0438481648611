"""The `grokmesh` command: runs the command that is asked for, and reports errors in one line."""

from __future__ import annotations

import argparse
import io
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import grpc

from cluster import daemon
from cluster.commands import (
    batch,
    bench_engine,
    bench_serve,
    cancel,
    convert,
    generate,
    health,
    inspect,
    key,
    plan,
    profile,
    restart,
    score,
    selftest,
    serve,
    status,
    stop,
    verify,
)
from cluster.commands.access import UsageError
from cluster.config.schema import ConfigError
from cluster.gateway.auth.api_keys import KeysError
from cluster.gateway.auth.tls import TlsError
from cluster.local_ray import LocalClusterError
from grokmesh import ClientError
from workers.capacity.hardware import HardwareError
from workers.checkpoint.errors import CheckpointError
from workers.model.config import ConfigError as ModelConfigError
from workers.text.tokenizer import TokenizerError

_COMMANDS = (
    serve,
    generate,
    score,
    cancel,
    batch,
    selftest,
    verify,
    plan,
    inspect,
    convert,
    status,
    profile,
    key,
    health,
    restart,
    stop,
)
_BENCHMARKS = {"serve": bench_serve, "engine": bench_engine}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; returns its exit code. What the user did wrong is said in one line, with code 2."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    parsed = _parser().parse_args(words)
    parsed.rest = words[1 + hasattr(parsed, "kind") :]  # for a command that is a program of its own
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a terminal need not know every character of a model's
    if sys.flags.optimize:
        print(
            "grokmesh: without assertions neither Haiku nor Ray works: unset PYTHONOPTIMIZE, leave out -O",
            file=sys.stderr,
        )
        return 2
    try:
        result: int = parsed.run(parsed)
        return result
    except (
        UsageError,
        ConfigError,
        CheckpointError,
        ModelConfigError,
        TokenizerError,
        daemon.DaemonError,
        KeysError,
        HardwareError,
        LocalClusterError,
        TlsError,
        ClientError,
    ) as error:
        print(f"grokmesh: {error}", file=sys.stderr)
        return 2
    except grpc.RpcError as error:
        call: Any = error  # what stubs raise is a call too
        print(f"grokmesh: {call.code().name}: {call.details()}", file=sys.stderr)
        return 1
    except (KeyboardInterrupt, BrokenPipeError):
        return 130
    except OSError as error:  # a port in use, a file that can't be read
        print(f"grokmesh: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="grokmesh", description="Serves Grok-1 from many hosts as one device mesh.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for module in _COMMANDS:
        _add(commands, module.__name__.rpartition(".")[2], module)
    kinds = commands.add_parser("bench", help="measure a running service, or the engine alone")
    benchmarks = kinds.add_subparsers(required=True, metavar="KIND", dest="kind")
    for name, module in _BENCHMARKS.items():
        _add(benchmarks, name, module)
    return parser


def _add(commands: Any, name: str, module: ModuleType) -> None:
    command = commands.add_parser(name, help=module.HELP)
    module.add_arguments(command)
    command.set_defaults(run=module.run)


if __name__ == "__main__":
    sys.exit(main())
