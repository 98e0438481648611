"""`grokmesh convert`."""

from __future__ import annotations

import argparse
import pathlib

from tools.gguf_export import export_gguf
from workers.checkpoint.checkpoint import open_checkpoint

HELP = "write a checkpoint in another format"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("directory", type=pathlib.Path, help="directory with ckpt-0/")
    parser.add_argument("target", type=pathlib.Path, help="file to write")
    parser.add_argument("--to", choices=("gguf",), required=True, help="format: gguf is llama.cpp's")
    parser.add_argument("--type", choices=("q8_0", "f32"), default="q8_0", help="of matrices (default: %(default)s)")


def run(arguments: argparse.Namespace) -> int:
    export_gguf(open_checkpoint(arguments.directory), arguments.target, arguments.type)
    print(f"{arguments.target}: {arguments.target.stat().st_size:,} bytes")
    return 0
