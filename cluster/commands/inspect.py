"""`grokmesh inspect`."""

from __future__ import annotations

import argparse
import pathlib
import re

from cluster.commands import access
from workers.checkpoint.checkpoint import open_checkpoint
from workers.checkpoint.digests import FILE, record
from workers.checkpoint.inspection import describe
from workers.checkpoint.storage import locate
from workers.model.layout import RULES, Layout

HELP = "list a checkpoint's tensors and its configuration"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("directory", help="directory with ckpt-0/, or its URL in an object store")
    parser.add_argument(
        "--digest",
        metavar="DATAxMODEL",
        help="read all, and record beside it the digests of what the devices of such a mesh hold; hosts compare with them",
    )
    parser.add_argument(
        "--rules", choices=RULES, default="tensor", help="how the model lies on that mesh (default: %(default)s)"
    )


def run(arguments: argparse.Namespace) -> int:
    if not arguments.digest:
        print(describe(locate(arguments.directory)))
        return 0
    found = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", arguments.digest)
    directory = pathlib.Path(arguments.directory)
    if found is None or not directory.is_dir():
        problem = "is no DATAxMODEL, such as 1x8" if found is None else f"needs a directory; {directory} is none"
        raise access.UsageError(f"--digest {arguments.digest}: {problem}")
    checkpoint = open_checkpoint(directory)
    sizes = {"data": int(found[1]), "model": int(found[2])}
    count = record(checkpoint, directory, Layout.of(checkpoint.config, sizes, arguments.rules))
    print(f"{directory / FILE}: digests of {count} parts")
    return 0
