"""Where workers are put."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from cluster.config.schema import ClusterSection
from cluster.controller.ray_placements import bundle, group_options, lacking_labels
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


def test_labels_that_no_node_has_are_named_with_who_sets_them() -> None:
    mesh = MeshSpec("tpu", hosts=2, devices_per_host=4, data=1, model=8, rules="tensor")
    options = group_options(mesh, ClusterSection(cpus_per_host=1, tpu_pod_type="v6e-8"), frozenset(["bad"]))
    hosts = [
        {"Alive": True, "Labels": {"ray.io/tpu-pod-type": "v6e-8", "ray.io/tpu-worker-id": str(rank)}}
        for rank in (0, 1)
    ]
    assert lacking_labels(options, hosts) == ""
    hosts[1]["Alive"] = False
    assert lacking_labels(options, hosts).startswith("ray.io/tpu-worker-id=1; Ray takes them")
    plain = [{"Alive": True, "Labels": {"ray.io/node-id": "a"}}]
    assert lacking_labels(options, plain).startswith("ray.io/tpu-pod-type=v6e-8, ray.io/tpu-worker-id=0, ")
    assert "webhook" in lacking_labels(options, plain)
    assert lacking_labels(group_options(mesh, ClusterSection(cpus_per_host=1), frozenset(["bad"])), plain) == ""
