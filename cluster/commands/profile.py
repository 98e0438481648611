"""`grokmesh profile`."""

from __future__ import annotations

import argparse
import pathlib
import time

from cluster.commands import access

HELP = "trace steps on all hosts of a replica with JAX's profiler"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    access.add_arguments(parser)
    parser.add_argument("--replica", type=int, default=0, help="number of the replica (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=20, help="steps to trace (default: %(default)s)")
    parser.add_argument("--timeout", type=float, default=60, help="seconds that they may take (default: %(default)s)")
    parser.add_argument("--output", type=pathlib.Path, default=pathlib.Path("profile"), help="folder for the traces")


def run(arguments: argparse.Namespace) -> int:
    folder: pathlib.Path = arguments.output / "plugins" / "profile" / time.strftime("%Y_%m_%d_%H_%M_%S")
    with access.client(arguments, attempts=1) as client:
        files = client.profile(arguments.replica, arguments.steps, timeout=arguments.timeout)
    for rank, path, content in files:
        # A run's files lie beside each other, named by host; XProf shows the hosts of a run together. Many steps are several
        # runs, which the workers number.
        ending = path.name.removeprefix(path.name.split(".")[0])
        number = path.parent.name.rpartition("_")[2]
        run = folder if number == "0000" else folder.with_name(f"{folder.name}_{number}")
        run.mkdir(parents=True, exist_ok=True)
        (run / f"host-{rank}{ending}").write_bytes(content)
    print(f"{len(files)} files in {folder}")
    print(f"xprof --logdir {arguments.output} shows them; ui.perfetto.dev opens the .trace.json.gz files")
    return 0
