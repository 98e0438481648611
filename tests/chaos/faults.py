"""Faults, when they strike, and how long it takes until they are noticed and mended."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import math
import random
import signal
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Protocol

from grok.serving.v1 import cluster_pb2
from tests.chaos.history import Load
from tests.chaos.namespaces import Cluster

PHASES = ("prefill", "decode", "idle", "building")
_READY = cluster_pb2.REPLICA_STATE_READY


class Target(Protocol):
    """A service with one replica of two hosts, whose worker processes can be sent signals."""

    def status(self) -> cluster_pb2.GetStatusResponse:
        """Its status."""

    def kill(self, host: cluster_pb2.HostStatus, number: int) -> None:
        """Sends a signal to a host's worker."""

    def heal(self) -> None:
        """Sees to it that there are as many hosts as there should be."""


#: Does something to a host, and returns what has to be done when the service has recovered.
Strike = Callable[[cluster_pb2.HostStatus], Callable[[], None]]


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What one fault came to; times in seconds after it."""

    fault: str
    phase: str
    detected: float
    recovered: float


def process_faults(target: Target) -> Mapping[str, tuple[int, Strike]]:
    """What can happen to a worker's process: by name, the rank and the strike."""

    def send(number: int, host: cluster_pb2.HostStatus) -> Callable[[], None]:
        with contextlib.suppress(ProcessLookupError):
            target.kill(host, number)
        return lambda: None

    return {
        f"{role} {verb}": (rank, functools.partial(send, number))
        for rank, role in enumerate(("leader", "follower"))
        for verb, number in (("killed", signal.SIGKILL), ("hangs", signal.SIGSTOP))
    }


def host_faults(cluster: Cluster) -> Mapping[str, tuple[int, Strike]]:
    """What can happen to a host: its Ray node ends, it is turned off, or it is cut from the network."""
    hosts = cluster.hosts

    def end_ray(host: cluster_pb2.HostStatus) -> Callable[[], None]:
        name = cluster.name_of(host.address)
        hosts.execute(name, "pkill", "-9", "raylet")
        return functools.partial(cluster.join, name)

    def turn_off(host: cluster_pb2.HostStatus) -> Callable[[], None]:
        name = cluster.name_of(host.address)
        hosts.crash(name)

        def mend() -> None:
            hosts.restart(name)
            cluster.join(name)

        return mend

    def cut(host: cluster_pb2.HostStatus) -> Callable[[], None]:
        name = cluster.name_of(host.address)
        hosts.cut(name)

        def mend() -> None:
            hosts.cut(name, False)
            cluster.join(name)

        return mend

    strikes = {"Ray node ends": end_ray, "host off": turn_off, "host cut off": cut}
    return {
        f"{role}'s {what}": (rank, strike)
        for rank, role in enumerate(("leader", "follower"))
        for what, strike in strikes.items()
    }


def inject(
    target: Target, faults: Mapping[str, tuple[int, Strike]], load: Load, name: str, phase: str, rng: random.Random
) -> Outcome:
    """Lets one fault strike the service's only replica in a phase of its life, and waits until it serves again."""
    rank, strike = faults[name]
    target.heal()
    replica = _wait(target, lambda replica: replica.state == _READY)
    if phase == "idle":
        load.pause(True)
        _wait(target, lambda replica: replica.running == 0)
        time.sleep(rng.uniform(0.5, 3.0))
    elif phase == "building":
        first = replica.epoch
        target.kill(replica.hosts[0], signal.SIGKILL)
        replica = _wait(target, lambda r: r.epoch > first and len(r.hosts) == 2)
        time.sleep(rng.uniform(0.0, 1.2))
    elif phase == "prefill":
        load.flood()
        time.sleep(rng.uniform(0.02, 0.2))
    else:
        time.sleep(rng.uniform(0.2, 2.0))
    replica = _wait(target, lambda replica: len(replica.hosts) == 2)
    epoch, state, struck = replica.epoch, replica.state, time.monotonic()
    mend = strike(replica.hosts[rank])
    _wait(
        target, lambda r: r.epoch > epoch or r.state == cluster_pb2.REPLICA_STATE_FAILED or state == _READY != r.state
    )
    detected = time.monotonic() - struck
    load.pause(False)
    _wait(target, lambda r: r.epoch > epoch and r.state == _READY)
    recovered = time.monotonic() - struck
    mend()
    return Outcome(name, phase, detected, recovered)


def table(outcomes: list[Outcome]) -> str:
    """Of each fault and phase, and of all: how often, and median and 99th percentile of the times."""
    rows = [f"{'fault':<24} {'phase':<9} {'n':>4}  {'detected s':>16}  {'recovered s':>16}"]
    groups = collections.defaultdict(list)
    for outcome in outcomes:
        groups[outcome.fault, outcome.phase].append(outcome)
    for (fault, phase), group in [*sorted(groups.items()), (("all", ""), outcomes)]:
        shown = [
            f"{statistics.median(values):>7.2f} {_p99(values):>8.2f}"
            for values in ([o.detected for o in group], [o.recovered for o in group])
        ]
        rows.append(f"{fault:<24} {phase:<9} {len(group):>4}  {shown[0]}  {shown[1]}")
    return "\n".join(rows)


def _p99(values: list[float]) -> float:
    return sorted(values)[math.ceil(0.99 * len(values)) - 1]


def _wait(
    target: Target, reached: Callable[[cluster_pb2.ReplicaStatus], bool], seconds: float = 120.0
) -> cluster_pb2.ReplicaStatus:
    deadline = time.monotonic() + seconds
    while not reached(replica := target.status().replicas[0]):
        assert time.monotonic() < deadline, f"not reached within {seconds} s: {replica}"
        time.sleep(0.02)
    return replica
