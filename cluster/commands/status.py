"""`grokmesh status`."""

from __future__ import annotations

import argparse

from cluster.commands import access
from grok.serving.v1 import cluster_pb2
from workers.messages.specs import describe_loading

HELP = "show replicas, hosts and load of a running service"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    access.add_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    with access.client(arguments, attempts=1) as client:
        print(format_status(client.status(timeout=5)))
    return 0


def format_status(status: cluster_pb2.GetStatusResponse) -> str:
    """The status as lines for an operator."""
    lines = [
        f"model {status.model}, version {status.version}, {status.requests} requests, "
        f"{status.wanted_replicas} replicas wanted, metrics at {status.metrics_url}",
        f"controller: pid {status.controller_pid}, metrics at {status.controller_metrics_url}",
    ]
    for gateway in status.gateways:
        state = "listening" if gateway.listening else "starting"
        lines.append(
            f"gateway: {gateway.address} pid {gateway.pid}, {state}, {gateway.replicas} replicas in reach, "
            f"{gateway.requests} requests, "
            f"metrics at {gateway.metrics_url}"
        )
    for replica in status.replicas:
        state = cluster_pb2.ReplicaState.Name(replica.state).removeprefix("REPLICA_STATE_").lower()
        lines.append(
            f"replica {replica.index}: {state}, epoch {replica.epoch}, mesh {replica.mesh_data} x {replica.mesh_model}, "
            f"{replica.running} running of {replica.slots} slots, {replica.waiting} waiting, "
            f"{replica.pages_used} of {replica.pages_total} KV pages, {replica.compilations} compilations since warm-up"
        )
        if replica.last_failure:
            in_a_row = f" ({replica.failures} in a row)" if replica.failures > 1 else ""
            lines.append(f"  last failure{in_a_row}: {replica.last_failure}")
        for host in replica.hosts:
            read = f"read {host.bytes_read:,} bytes"
            if host.bytes_per_second:
                read = describe_loading(host.bytes_read, host.bytes_total, host.bytes_per_second)
            lines.append(
                f"  host {host.rank}: {host.address} pid {host.pid}, {host.devices} devices, {host.phase}, "
                f"{read}, metrics at {host.metrics_url}"
            )
    return "\n".join(lines)
