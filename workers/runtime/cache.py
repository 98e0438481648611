"""The paged cache of keys and values, and how the model reads and writes it."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from workers.engine.plan import EngineShape
from workers.kernels.pages import Pages, QuantizedPages
from workers.model.config import GrokConfig
from workers.model.parameters import Axes
from workers.model.partition import Partition

ROW_AXES: Axes = ("batch", None, "kv_heads", None)
TABLE_AXES: Axes = ("batch", None)

LayerPages = tuple[Pages, Pages]


def page_axes(partition: Partition) -> Axes:
    """The first logical axes of pages: those of all groups are split with the batch, heads as keys and values are."""
    return ("kv_heads", "batch") if partition.kernels.heads_first else ("batch", "kv_heads")


def page_shapes(
    config: GrokConfig, shape: EngineShape, partition: Partition, dtype: jnp.dtype | type
) -> tuple[Pages, Pages]:
    """Shapes of a layer's keys and values in `dtype`; int8 ones have a scale for each position of a head."""
    sharding = partition.sharding(page_axes(partition))
    count, heads, size, page = shape.groups * shape.pages, config.num_kv_heads, config.key_size, shape.page_size

    def array(dims: tuple[int, ...], dtype: jnp.dtype | type) -> Any:
        return jax.ShapeDtypeStruct(dims, dtype, sharding=sharding)

    def pages(lead: tuple[int, int], rest: tuple[int, int]) -> Pages:
        values: jax.Array = array((*lead, *rest), dtype)
        return QuantizedPages(values, array((*lead, page), jnp.float32)) if dtype == jnp.int8 else values

    if partition.kernels.heads_first:
        return pages((heads, count), (page, size)), pages((heads, count), (page, size))
    return pages((count, heads), (size, page)), pages((count, heads), (page, size))


@dataclasses.dataclass
class PagedAttend:
    """The model's `attend`: writes each layer's new keys and values to their pages, then attends to all pages.

    `pages` holds the updated arrays afterwards.
    """

    pages: list[LayerPages]
    table: jax.Array  # [B, N], pages local to the row's group
    positions: jax.Array  # [B, T]
    scale: float
    partition: Partition

    def __call__(self, layer: int, query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
        """[B, T, H, C], [B, T, K, C] twice -> [B, T, H, C]."""
        key_pages, value_pages = self.pages[layer]
        spec = self.partition.spec
        pages = spec(page_axes(self.partition))
        operation = self.partition.on_parts(
            functools.partial(self.partition.kernels.attend, scale=self.scale),
            (
                spec(("batch", None, "q_heads", None)),
                spec(ROW_AXES),
                spec(ROW_AXES),
                pages,
                pages,
                spec(TABLE_AXES),
                spec(TABLE_AXES),
            ),
            (spec(("batch", None, "q_heads", None)), pages, pages),
        )
        mixed: jax.Array
        mixed, key_pages, value_pages = operation(query, key, value, key_pages, value_pages, self.table, self.positions)
        self.pages[layer] = (key_pages, value_pages)
        return mixed
