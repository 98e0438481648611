"""What each host of a mesh gets when it joins."""

from __future__ import annotations

import secrets
from collections.abc import Sequence

from cluster.config.schema import Config
from workers.messages.specs import Endpoint, RankSpec, WeightsAddress


def rank_specs(
    config: Config,
    group: str,
    replica: int,
    epoch: int,
    endpoints: Sequence[Endpoint],
    weights: Sequence[Sequence[WeightsAddress]],
) -> list[RankSpec]:
    """The specs of a replica's hosts, which a placement group has reserved, in an epoch, in rank order. `weights` has for each
    replica that serves the weights caches of its hosts: of as many, those of the same rank hold the same."""
    first, secret = endpoints[0], secrets.token_bytes(32)
    return [
        RankSpec(
            replica=replica,
            epoch=epoch,
            secret=secret,
            rank=rank,
            coordinator=f"{first.address}:{first.coordinator_port}",
            leader=f"{first.address}:{first.leader_port}",
            model=config.model,
            mesh=config.mesh,
            engine=config.engine,
            compilation_cache=config.cluster.compilation_cache or None,
            liveness=endpoint.liveness,
            silence_seconds=config.cluster.silence_seconds,
            stall_seconds=config.telemetry.stall_seconds,
            plan_log=config.telemetry.plan_log,
            group=group,
            twins=tuple(hosts[rank] for hosts in weights if len(hosts) == len(endpoints)),
        )
        for rank, endpoint in enumerate(endpoints)
    ]
