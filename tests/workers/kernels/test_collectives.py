"""What crosses between CPU devices of one process. Several processes: tests/workers/host/test_rendezvous.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

from workers.kernels.cpu.kernels import native_kernels
from workers.kernels.interface import Site
from workers.model.config import GrokConfig
from workers.model.layout import MeshAxes
from workers.model.partition import Partition

BOTH = ("data", "model")
MESH = Mesh(np.array(jax.devices()[:4]).reshape(2, 2), BOTH)
PARTITION = Partition.create(GrokConfig(), MESH, "batch", native_kernels())
#: Which devices exchange along mesh axes.
GROUPS = {BOTH: [[0, 1, 2, 3]], ("data",): [[0, 2], [1, 3]], ("model",): [[0, 1], [2, 3]]}
#: Of a device; the last one takes several pieces.
SIZES = (1, 100, 6144, 40_001, 300_000)


def _on_devices(function: Callable[[jax.Array], jax.Array], parts: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """What `function` makes of each device's part [...] of [4, ...]: [4, ...]."""
    over = PartitionSpec(BOTH)
    program = jax.jit(PARTITION.on_parts(lambda x: function(x[0])[None], over, over))
    return np.asarray(program(jnp.asarray(parts)))


@pytest.mark.parametrize("axes", GROUPS)
@pytest.mark.parametrize("size", SIZES)
def test_a_sum_adds_the_devices_in_their_order(axes: MeshAxes, size: int) -> None:
    parts = np.random.default_rng(size).standard_normal((4, size), np.float32)
    parts *= np.array([1, 10, 100, 1000], np.float32)[:, None]
    found = _on_devices(lambda x: PARTITION.sum(x, axes, Site.EXPERTS), parts)
    for group in GROUPS[axes]:
        total = parts[group[0]]
        for device in group[1:]:
            total = total + parts[device]
        for device in group:
            np.testing.assert_array_equal(found[device], total)


@pytest.mark.parametrize("axes", GROUPS)
@pytest.mark.parametrize("rows", [1, 3, 40_000])
@pytest.mark.parametrize("dtype", [np.int32, np.float32, np.bool_])
def test_gathered_rows_are_in_the_order_of_the_devices(axes: MeshAxes, rows: int, dtype: type) -> None:
    parts: np.ndarray[Any, Any] = np.random.default_rng(rows).integers(0, 2, (4, rows, 5)).astype(dtype)
    found = _on_devices(lambda x: PARTITION.gather(x, axes, Site.SAMPLES), parts)
    for group in GROUPS[axes]:
        for device in group:
            np.testing.assert_array_equal(found[device], np.concatenate(parts[group]))


@pytest.mark.parametrize("axes", GROUPS)
@pytest.mark.parametrize(("rows", "columns"), [(1, 3), (2, 100), (3, 70_000)])
def test_columns_of_all_rows_become_all_columns_of_some_rows(axes: MeshAxes, rows: int, columns: int) -> None:
    size = len(GROUPS[axes][0])
    parts = np.random.default_rng(rows).standard_normal((4, rows * size, columns), np.float32)
    found = _on_devices(lambda x: PARTITION.exchange(x, axes, Site.LOGITS), parts)
    for group in GROUPS[axes]:
        whole = np.concatenate(parts[group], axis=1)
        for place, device in enumerate(group):
            np.testing.assert_array_equal(found[device], whole[place * rows : (place + 1) * rows])


def test_sums_follow_each_other_without_a_trace_of_those_before() -> None:
    """Each of a thousand, one after the other at one site, adds what the one before found."""

    def step(_: int, x: jax.Array) -> jax.Array:
        return (PARTITION.sum(x, BOTH, Site.ATTENTION) + jax.lax.axis_index(BOTH)) % 1009

    found = _on_devices(lambda x: jax.lax.fori_loop(0, 1000, step, x), np.arange(4 * 7, dtype=np.float32).reshape(4, 7))
    expected = np.arange(4 * 7, dtype=np.int64).reshape(4, 7)
    for _ in range(1000):
        expected = (expected.sum(axis=0) + np.arange(4)[:, None]) % 1009
    np.testing.assert_array_equal(found, expected.astype(np.float32))


def test_only_floats_are_added() -> None:
    with pytest.raises(TypeError, match="a sum of int32"):
        _on_devices(lambda x: PARTITION.sum(x, BOTH, Site.EXPERTS), np.zeros((4, 1), np.int32))
