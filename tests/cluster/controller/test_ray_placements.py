"""Where workers are put."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from cluster.config.schema import ClusterSection
from cluster.controller.ray_placements import bundle, group_options
from workers.messages.specs import MeshSpec

pytestmark = pytest.mark.slow


def test_a_host_of_accelerators_is_taken_whole() -> None:
    mesh = MeshSpec("gpu", hosts=2, devices_per_host=8, data=2, model=8, rules="tensor")
    assert bundle(mesh, cpus_per_host=4) == {"CPU": 4, "GPU": 8}
    options = group_options(mesh, ClusterSection(cpus_per_host=4))
    assert options == {"bundles": [{"CPU": 4, "GPU": 8}] * 2, "strategy": "STRICT_SPREAD"}


def test_a_replica_lies_on_one_tpu_slice_with_ranks_in_its_order_and_hosts_keep_their_ranks() -> None:
    command = [sys.executable, "-m", "tests.cluster.controller.fake_slices"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    ranks, kept = json.loads(done.stdout.splitlines()[-1])
    assert ranks == [{"slice-name": "whole", "worker-id": "0"}, {"slice-name": "whole", "worker-id": "1"}]
    assert all(kept)
