"""Faults under load: no stream may lose, repeat or change a token, and no client may see an error.

GROKMESH_FAULTS sets how many; `make chaos` tries hundreds. GROKMESH_SEED makes another row of them.
"""

from __future__ import annotations

import itertools
import os
import pathlib
import random
from collections.abc import Mapping

import pytest

from grokmesh import Client
from tests.chaos import namespaces
from tests.chaos.faults import PHASES, Strike, Target, host_faults, inject, process_faults, table
from tests.chaos.history import Load, make_cases
from tests.support.service import running

FAULTS = int(os.environ.get("GROKMESH_FAULTS", "0"))
SEED = int(os.environ.get("GROKMESH_SEED", "0"))
CLIENTS = 6


def _run(target: Target, address: str, faults: Mapping[str, tuple[int, Strike]], count: int) -> None:
    rng = random.Random(SEED)
    # Every fault in every phase, in random order, again and again.
    cells = list(itertools.product(faults, PHASES))
    rows = (rng.sample(cells, len(cells)) for _ in itertools.count())
    with Client(address) as client:
        cases = make_cases(client, 24, SEED)
    load = Load(address, cases, CLIENTS, SEED)
    outcomes = []
    try:
        for i, (name, phase) in enumerate(itertools.islice(itertools.chain.from_iterable(rows), count)):
            outcomes.append(inject(target, faults, load, name, phase, rng))
            print(f"{i + 1}: {outcomes[-1]}, {load.history.completed} streams", flush=True)
    finally:
        print(table(outcomes), load.history, sep="\n")
    load.stop().check(count)


def test_lost_processes_change_nothing_that_a_client_sees(tmp_path: pathlib.Path) -> None:
    if FAULTS:
        pytest.skip("hosts with network and processes of their own suffer these faults too")
    mesh = {"hosts": 2, "devices_per_host": 1, "data": 1, "model": 2}
    with running(tmp_path, mesh=mesh) as service:
        _run(service, service.address, process_faults(service), 3)


def test_lost_hosts_change_nothing_that_a_client_sees(tmp_path: pathlib.Path) -> None:
    if not namespaces.possible():
        pytest.skip("needs root to make namespaces")
    with namespaces.cluster(tmp_path) as cluster:
        front = namespaces.ADDRESSES[namespaces.FRONT]
        assert front in cluster.status().controller_metrics_url, "a host that computes may be lost"
        _run(cluster, cluster.address, {**process_faults(cluster), **host_faults(cluster)}, FAULTS or 4)
