"""What each host of a mesh gets when it joins."""

from __future__ import annotations

import secrets
from collections.abc import Sequence

from cluster.config.schema import Config
from workers.messages.specs import Endpoint, RankSpec, WeightsAddress


def rank_specs(
    config: Config, replica: int, epoch: int, endpoints: Sequence[Endpoint], weights: Sequence[WeightsAddress]
) -> list[RankSpec]:
    """The specs of a replica's hosts in an epoch, in rank order. `weights` are the weights caches of replicas that serve."""
    first, secret = endpoints[0], secrets.token_bytes(32)
    # Where the data axis spans hosts, some of its own hosts hold the same too.
    twins = [*weights, *(endpoint.weights for endpoint in endpoints if endpoint.weights is not None)]
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
            twins=tuple(twin for twin in twins if twin != endpoint.weights),
        )
        for rank, endpoint in enumerate(endpoints)
    ]
