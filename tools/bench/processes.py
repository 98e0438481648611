"""What a process takes of the machine."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Callable, Sequence

ROUNDS = 3


def resident(pid: int) -> float:
    """MiB of memory that a process has."""
    for line in pathlib.Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS"):
            return int(line.split()[1]) / 1024
    raise ProcessLookupError(pid)


def cpu_seconds(pid: int) -> float:
    """Processor time that a process has taken."""
    fields = pathlib.Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def cpu_of_each(pids: Sequence[int], work: Callable[[], int]) -> float:
    """Processor time that processes take for each of what `work` counts: the best of some rounds, after one that warms up."""
    work()
    rounds = []
    for _ in range(ROUNDS):
        before = sum(map(cpu_seconds, pids))
        count = work()
        rounds.append((sum(map(cpu_seconds, pids)) - before) / count)
    return min(rounds)
