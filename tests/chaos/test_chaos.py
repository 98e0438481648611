"""Random faults under load: no stream may lose, repeat or change a token, and no client may see an error.

GROKMESH_FAULTS sets how many; `make chaos` tries hundreds. GROKMESH_SEED makes another row of them.
"""

from __future__ import annotations

import os
import pathlib
import random

from cluster.client import Client
from tests.chaos.faults import inject, table
from tests.chaos.history import Load, make_cases
from tests.cluster.service import running

FAULTS = int(os.environ.get("GROKMESH_FAULTS", "3"))
SEED = int(os.environ.get("GROKMESH_SEED", "0"))
CLIENTS = 6


def test_faults_change_nothing_that_a_client_sees(tmp_path: pathlib.Path) -> None:
    rng = random.Random(SEED)
    mesh = {"hosts": 2, "devices_per_host": 1, "data": 1, "model": 2}
    with running(tmp_path, mesh=mesh, gateway={"address": "127.0.0.1:50161"}) as service:
        with Client(service.address) as client:
            cases = make_cases(client, 24, SEED)
        load = Load(service.address, cases, CLIENTS, SEED)
        outcomes = []
        for i in range(FAULTS):
            outcomes.append(inject(service, load, rng))
            print(f"{i + 1}: {outcomes[-1]}", flush=True)
        history = load.stop()
    print(table(outcomes))
    print(f"{history.completed} streams, longest pause {history.longest_pause:.1f} s, {len(history.failed)} errors")
    assert not history.wrong, history.wrong
    assert not history.failed, history.failed
    assert history.completed > FAULTS
