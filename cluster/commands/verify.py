"""`grokmesh verify`."""

from __future__ import annotations

import argparse
import subprocess
import sys

from tools.verify import options

HELP = "compare a checkpoint's logits and tokens with a golden set"
add_arguments = options.add_arguments


def run(arguments: argparse.Namespace) -> int:
    """Runs it in a process of its own: JAX stays out of this one, as the control plane never imports it."""
    return subprocess.run([sys.executable, "-P", "-m", "tools.verify.verify", *arguments.rest], check=False).returncode
