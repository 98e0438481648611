"""How long a decode step takes on one process and on two hosts with as many devices in all, and where it goes.

python -m tools.bench.decode_step [--checkpoint DIR] [--devices 2]
"""

from __future__ import annotations

import argparse
import asyncio
import pathlib
import tempfile

from grokmesh import AsyncClient
from tests.conftest import DEMO
from tests.support.service import Service, read_metrics, running

TOKENS = 120
ROUNDS = 3
BATCHES = (1, 8, 16)
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
    parser = argparse.ArgumentParser()
    parser.add_argument("--checkpoint", type=pathlib.Path, default=DEMO)
    parser.add_argument("--devices", type=int, default=4)
    arguments = parser.parse_args()
    model = {"name": "bench", "checkpoint": str(arguments.checkpoint.resolve())}
    engine = {"context": 512, "page_size": 64}
    totals: dict[tuple[int, int], float] = {}
    for hosts in (1, 2):
        mesh = {"hosts": hosts, "devices_per_host": arguments.devices // hosts, "data": 1, "model": arguments.devices}
        with (
            tempfile.TemporaryDirectory() as folder,
            running(pathlib.Path(folder), mesh=mesh, model=model, engine=engine) as service,
        ):
            for batch in BATCHES:
                rounds = [_measure(service, batch) for _ in range(ROUNDS)]
                best = min(rounds, key=lambda parts: sum(parts.values()))
                total = totals[hosts, batch] = sum(best.values())
                share = sum(best[part] for part in OURS) / total
                shown = ", ".join(f"{part} {best[part]:.2f}" for part in PARTS)
                print(f"hosts {hosts} batch {batch}: {total:.2f} ms a step ({shown}); our own Python {share:.1%}")
    for batch in BATCHES:
        print(f"batch {batch}: two hosts have {totals[1, batch] / totals[2, batch]:.2f} of one process' speed")


if __name__ == "__main__":
    main()
