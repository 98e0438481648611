"""`grokmesh serve`."""

from __future__ import annotations

import argparse
import pathlib

from cluster import daemon
from cluster.config.reader import load_config
from cluster.local_ray import prepare_environment
from workers.telemetry import logs

CONFIG = pathlib.Path("ray_config.yaml")
HELP = "start replicas and gateway as ray_config.yaml says"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", type=pathlib.Path, default=CONFIG, help="configuration (default: %(default)s)")
    parser.add_argument("--detach", action="store_true", help="leave it running in the background, once it serves")
    parser.add_argument(
        "--timeout",
        type=float,
        default=600,
        help="seconds that --detach waits; 0: only until the gateway listens (default: %(default)s)",
    )
    parser.add_argument(
        "--replace", action="store_true", help="take over from the running service, once this one is ready to serve"
    )


def run(arguments: argparse.Namespace) -> int:
    path: pathlib.Path = arguments.config
    config = load_config(path)
    if arguments.detach:
        log = daemon.start(config, path, arguments.timeout, replace=arguments.replace)
        print(f"running in the background; its log is {log}, `grokmesh stop` ends it")
        return 0
    if config.cluster.address == "local":
        prepare_environment()
    from cluster.service import serve  # Ray takes a second to import, and reads its environment then.

    logs.configure()
    serve(config, path, replace=arguments.replace)
    return 0
