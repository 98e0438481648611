"""The options of `grokmesh bench engine`. Without JAX."""

from __future__ import annotations

import argparse
import pathlib

from workers.messages.specs import ACTIVATIONS, WEIGHTS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds them."""
    parser.add_argument(
        "--checkpoint", type=pathlib.Path, required=True, help="directory; a random model if it is empty"
    )
    parser.add_argument("--weights", choices=WEIGHTS, default="int8", help="as kept on devices (default: %(default)s)")
    parser.add_argument("--kv-cache", choices=ACTIVATIONS, default="bfloat16", help="type (default: %(default)s)")
    parser.add_argument("--devices", type=int, default=1, help="devices of the mesh (default: %(default)s)")
    parser.add_argument(
        "--context", type=int, default=8000, help="positions of the long case; 0: none (default: %(default)s)"
    )
    parser.add_argument("--output", type=pathlib.Path, help="JSON file to write")
