"""What a process has of the machine."""

from __future__ import annotations

import pathlib


def resident(pid: int) -> float:
    """MiB of memory that a process has."""
    for line in pathlib.Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS"):
            return int(line.split()[1]) / 1024
    raise ProcessLookupError(pid)
