"""Sums over the devices of a mesh."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

import workers.model.partition
from workers.kernels.gpu.kernels import GPU
from workers.kernels.interface import Site
from workers.model.config import GrokConfig
from workers.model.partition import Partition


@pytest.mark.parametrize("gathered", [0, 1 << 30])
def test_kernels_that_promise_the_same_bits_have_devices_added_in_rank_order(
    gathered: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether each device adds up everything or a part."""
    monkeypatch.setattr(workers.model.partition, "_GATHERED", gathered)
    mesh = Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("data", "model"))
    partition = Partition.create(GrokConfig(), mesh, "batch", GPU)
    parts = np.random.default_rng(0).standard_normal((4, 3, 5, 8), np.float32)
    over = ("data", "model")

    def total(x: jax.Array) -> jax.Array:
        return partition.sum(x[0], over, Site.EXPERTS)

    summed: Callable[[Any], Any] = jax.jit(partition.on_parts(total, PartitionSpec(over), PartitionSpec()))
    in_order = ((parts[0] + parts[1]) + parts[2]) + parts[3]
    np.testing.assert_array_equal(summed(jnp.asarray(parts)), in_order)
