"""Faults, when they strike, and how long it takes until they are noticed and mended."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import os
import random
import signal
import statistics
import time
from collections.abc import Callable

from grok.serving.v1 import cluster_pb2
from tests.chaos.history import Load
from tests.cluster.service import Service

FAULTS = {
    "leader killed": (0, signal.SIGKILL),
    "follower killed": (1, signal.SIGKILL),
    "leader hangs": (0, signal.SIGSTOP),
    "follower hangs": (1, signal.SIGSTOP),
}
PHASES = ("busy", "idle", "building")


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What one fault came to; times in seconds after it."""

    fault: str
    phase: str
    detected: float
    recovered: float


def inject(service: Service, load: Load, rng: random.Random) -> Outcome:
    """Does one thing to the service's only replica, and waits until it serves again."""
    fault, phase = rng.choice(list(FAULTS)), rng.choice(PHASES)
    rank, number = FAULTS[fault]
    replica = _wait(service, lambda replica: replica.state == cluster_pb2.REPLICA_STATE_READY)
    load.pause(phase == "idle")
    if phase == "idle":
        replica = _wait(service, lambda replica: replica.running == 0)
        time.sleep(rng.uniform(0.5, 3.0))
    elif phase == "building":
        os.kill(replica.hosts[0].pid, signal.SIGKILL)
        epoch = replica.epoch
        replica = _wait(service, lambda r: r.epoch > epoch and len(r.hosts) == 2)
        time.sleep(rng.uniform(0.0, 4.0))
        replica = service.status().replicas[0]
    else:
        time.sleep(rng.uniform(0.2, 2.0))
    epoch, struck = replica.epoch, time.monotonic()
    with contextlib.suppress(ProcessLookupError):
        os.kill(replica.hosts[rank].pid, number)
    ready = cluster_pb2.REPLICA_STATE_READY
    if phase == "building":
        ended = lambda r: r.epoch > epoch or r.state == cluster_pb2.REPLICA_STATE_FAILED  # noqa: E731
    else:
        ended = lambda r: r.epoch > epoch or r.state != ready  # noqa: E731
    _wait(service, ended)
    detected = time.monotonic() - struck
    load.pause(False)
    _wait(service, lambda r: r.epoch > epoch and r.state == ready)
    return Outcome(fault, phase, detected, time.monotonic() - struck)


def table(outcomes: list[Outcome]) -> str:
    """Of each fault and phase: how often, and median and greatest times."""
    rows = [f"{'fault':<16} {'phase':<9} {'n':>4}  {'detected s':>16}  {'recovered s':>16}"]
    groups = collections.defaultdict(list)
    for outcome in outcomes:
        groups[outcome.fault, outcome.phase].append(outcome)
    for (fault, phase), group in sorted(groups.items()):
        shown = [
            f"{statistics.median(values):>7.2f} {max(values):>8.2f}"
            for values in ([o.detected for o in group], [o.recovered for o in group])
        ]
        rows.append(f"{fault:<16} {phase:<9} {len(group):>4}  {shown[0]}  {shown[1]}")
    return "\n".join(rows)


def _wait(
    service: Service, reached: Callable[[cluster_pb2.ReplicaStatus], bool], seconds: float = 120.0
) -> cluster_pb2.ReplicaStatus:
    deadline = time.monotonic() + seconds
    while not reached(replica := service.status().replicas[0]):
        assert time.monotonic() < deadline, f"not reached within {seconds} s: {replica}"
        time.sleep(0.02)
    return replica
