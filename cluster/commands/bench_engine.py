"""`grokmesh bench engine`."""

from __future__ import annotations

import argparse
import subprocess
import sys

from tools.bench import options

HELP = "steps of the engine as shares of what this machine can do"
add_arguments = options.add_arguments


def run(arguments: argparse.Namespace) -> int:
    """Runs it in a process of its own: JAX stays out of this one, as the control plane never imports it."""
    return subprocess.run([sys.executable, "-P", "-m", "tools.bench.engine", *arguments.rest], check=False).returncode
