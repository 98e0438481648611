"""How long a decode step of the demo takes on one process and on two hosts with the same four devices, and where it goes.

python -m tests.bench.decode_step
"""

from __future__ import annotations

import asyncio
import pathlib
import tempfile

from cluster.client import AsyncClient
from tests.cluster.service import Service, read_metrics, running

TOKENS = 200
ROUNDS = 3
PARTS = ("plan", "broadcast", "dispatch", "device", "deliver")
#: Parts in which our own Python works while no device does; `dispatch` and `device` are JAX and the devices.
OURS = ("plan", "broadcast", "deliver")


def _leader_metrics(service: Service) -> dict[str, float]:
    return read_metrics(service.status().replicas[0].hosts[0].metrics_url)


async def _stream(address: str, batch: int) -> None:
    async with AsyncClient(address) as client:

        async def one(seed: int) -> None:
            async for _ in client.generate("And", max_tokens=TOKENS, seed=seed, ignore_eos=True):
                pass

        await asyncio.gather(*(one(seed) for seed in range(batch)))


def _measure(service: Service, batch: int) -> dict[str, float]:
    """Milliseconds a step by part, over one round of `batch` streams."""
    before = _leader_metrics(service)
    asyncio.run(_stream(service.address, batch))
    after = _leader_metrics(service)
    steps = after["grokmesh_worker_plans_total"] - before["grokmesh_worker_plans_total"]
    names = {part: f'grokmesh_engine_host_seconds_total{{part="{part}"}}' for part in PARTS}
    return {part: (after[name] - before.get(name, 0.0)) / steps * 1000 for part, name in names.items()}


def main() -> None:
    """Prints a line a batch size and number of hosts, then the ratios. The best of ROUNDS rounds counts."""
    totals: dict[tuple[int, int], float] = {}
    for hosts in (1, 2):
        mesh = {"hosts": hosts, "devices_per_host": 4 // hosts, "data": 2, "model": 2}
        with tempfile.TemporaryDirectory() as folder, running(pathlib.Path(folder), mesh=mesh) as service:
            for batch in (1, 16):
                rounds = [_measure(service, batch) for _ in range(ROUNDS)]
                best = min(rounds, key=lambda parts: sum(parts.values()))
                total = totals[hosts, batch] = sum(best.values())
                share = sum(best[part] for part in OURS) / total
                shown = ", ".join(f"{part} {best[part]:.2f}" for part in PARTS)
                print(f"hosts {hosts} batch {batch}: {total:.2f} ms a step ({shown}); our own Python {share:.1%}")
    for batch in (1, 16):
        print(f"batch {batch}: two hosts take {totals[2, batch] / totals[1, batch]:.2f} x one process")


if __name__ == "__main__":
    main()
