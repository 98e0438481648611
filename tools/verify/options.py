"""The options of `grokmesh verify`. Without JAX."""

from __future__ import annotations

import argparse
import pathlib

from workers.messages.specs import ACTIVATIONS, PLATFORMS, WEIGHTS
from workers.model.layout import RULES


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds them."""
    parser.add_argument("--checkpoint", type=pathlib.Path, required=True, help="directory with ckpt-0/")
    parser.add_argument("--golden", type=pathlib.Path, required=True, help="directory of the golden set")
    parser.add_argument("--mesh", default="1x1", metavar="DATAxMODEL", help="device mesh (default: %(default)s)")
    parser.add_argument(
        "--rules", choices=RULES, default="tensor", help="how the model lies on it (default: %(default)s)"
    )
    parser.add_argument("--weights", choices=WEIGHTS, default="int8", help="as kept on devices (default: %(default)s)")
    parser.add_argument("--activations", choices=ACTIVATIONS, default="float32", help="type (default: %(default)s)")
    parser.add_argument("--platform", choices=PLATFORMS, default="cpu", help="of the devices (default: %(default)s)")
    parser.add_argument("--hosts", type=int, default=1, help="processes that form the mesh (default: %(default)s)")
