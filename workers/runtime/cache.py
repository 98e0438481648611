"""The paged cache of keys and values, and how the model reads and writes it."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from workers.engine.plan import EngineShape
from workers.kernels.paged_attention import paged_attention
from workers.model.config import GrokConfig
from workers.model.parameters import Axes
from workers.model.partition import Partition

#: Pages of all groups, split with the batch; heads as the projections that make them.
PAGE_AXES: Axes = ("batch", None, "kv_heads", None)
ROW_AXES: Axes = ("batch", None, "kv_heads", None)
TABLE_AXES: Axes = ("batch", None)

LayerPages = tuple[jax.Array, jax.Array]


def allocate_pages(
    config: GrokConfig, shape: EngineShape, partition: Partition, dtype: jnp.dtype | type
) -> tuple[LayerPages, ...]:
    """Zeroed pages of keys and values, [groups * pages, page_size, K, C] each, a pair a layer."""
    dims = (shape.groups * shape.pages, shape.page_size, config.num_kv_heads, config.key_size)
    sharding = partition.sharding(PAGE_AXES)
    zeros = jax.jit(lambda: jnp.zeros(dims, dtype), out_shardings=sharding)
    return tuple((zeros(), zeros()) for _ in range(config.num_layers))


@dataclasses.dataclass
class PagedAttend:
    """The model's `attend`: writes each layer's new keys and values to their pages, then attends to all pages.

    `pages` holds the updated arrays afterwards. Padding is written to page 0, which no sequence owns.
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
        operation = self.partition.on_parts(
            self._local,
            (
                spec(("batch", None, "q_heads", None)),
                spec(ROW_AXES),
                spec(ROW_AXES),
                spec(PAGE_AXES),
                spec(PAGE_AXES),
                spec(TABLE_AXES),
                spec(TABLE_AXES),
            ),
            (spec(("batch", None, "q_heads", None)), spec(PAGE_AXES), spec(PAGE_AXES)),
        )
        mixed: jax.Array
        mixed, key_pages, value_pages = operation(query, key, value, key_pages, value_pages, self.table, self.positions)
        self.pages[layer] = (key_pages, value_pages)
        return mixed

    def _local(
        self,
        query: jax.Array,
        key: jax.Array,
        value: jax.Array,
        key_pages: jax.Array,
        value_pages: jax.Array,
        table: jax.Array,
        positions: jax.Array,
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        page_size = key_pages.shape[1]
        place = jnp.maximum(positions, 0)
        page = jnp.take_along_axis(table, place // page_size, axis=1)  # [B, T]
        page = jnp.where(positions >= 0, page, 0)
        key_pages = key_pages.at[page, place % page_size].set(key.astype(key_pages.dtype))
        value_pages = value_pages.at[page, place % page_size].set(value.astype(value_pages.dtype))
        mixed = paged_attention(query, key_pages, value_pages, table, positions, self.scale)
        return mixed, key_pages, value_pages
