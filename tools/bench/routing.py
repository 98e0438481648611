"""How much of what prompts share is found again when two replicas serve, and how even their load is.

python -m tools.bench.routing

A thousand requests of 64 shared prefixes, all on one replica, and then on two. The caches of both hold all prefixes.
"""

from __future__ import annotations

import argparse
import asyncio
import pathlib
import random
import tempfile
from typing import Any, get_args

from cluster.gateway.routing.affinity import Cause
from grok.serving.v1 import cluster_pb2
from grokmesh import AsyncClient
from tests.support.service import Service, read_metrics, running

PREFIXES, PREFIX_LENGTH, OWN_LENGTH, TOKENS, CLIENTS = 64, 96, 16, 8, 32
CAUSES = get_args(Cause)


def _prompts(count: int) -> list[list[int]]:
    rng = random.Random(0)
    prefixes = [[rng.randrange(3, 2048) for _ in range(PREFIX_LENGTH)] for _ in range(PREFIXES)]
    return [[*rng.choice(prefixes), *(rng.randrange(3, 2048) for _ in range(OWN_LENGTH))] for _ in range(count)]


async def _ask(address: str, prompts: list[list[int]]) -> None:
    places = asyncio.Semaphore(CLIENTS)
    async with AsyncClient(address) as client:

        async def one(prompt: list[int]) -> None:
            async with places:
                await client.complete(prompt, max_tokens=TOKENS, ignore_eos=True)

        await asyncio.gather(*map(one, prompts))


def _positions(service: Service, result: str) -> list[float]:
    """Prompt positions of each replica that its cache had (hit) or that were computed (miss)."""
    urls = [replica.hosts[0].metrics_url for replica in service.status().replicas]
    name = "grokmesh_engine_prefix_tokens_total"
    return [
        sum(value for key, value in read_metrics(url).items() if key.startswith(name) and f'"{result}"' in key)
        for url in urls
    ]


def _all_ready(status: cluster_pb2.GetStatusResponse) -> bool:
    return all(replica.state == cluster_pb2.REPLICA_STATE_READY for replica in status.replicas)


def main() -> None:
    """Prints hits with one and with two replicas, and how the requests were spread."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=1000)
    prompts = _prompts(parser.parse_args().requests)
    total = sum(map(len, prompts))
    mesh = {"hosts": 1, "devices_per_host": 1, "data": 1, "model": 1}
    pages = 2 * PREFIXES * -(-PREFIX_LENGTH // 16) + 512
    shares = []
    for replicas in (1, 2):
        sections: dict[str, Any] = {"mesh": mesh, "replicas": replicas, "engine": {"kv_pages": pages}}
        with tempfile.TemporaryDirectory() as folder, running(pathlib.Path(folder), **sections) as service:
            service.wait_for(_all_ready, 60)
            asyncio.run(_ask(service.address, prompts))
            hits, misses = _positions(service, "hit"), _positions(service, "miss")
            measured = read_metrics(service.status().metrics_url)
        shares.append(sum(hits) / total)
        load = [hit + miss for hit, miss in zip(hits, misses, strict=True)]
        causes = {
            cause: int(measured[f'grokmesh_gateway_routed_sessions_total{{cause="{cause}"}}']) for cause in CAUSES
        }
        even = max(load) * replicas / sum(load)
        print(f"{replicas} replica(s): {shares[-1]:.1%} of positions found, load {even:.2f} of even, sent by {causes}")
    print(f"two replicas found {shares[1] / shares[0]:.3f} of what one found")


if __name__ == "__main__":
    main()
