"""The paged cache of keys and values, and how the model reads and writes it."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from workers.kernels.kv_pages import Pages, QuantizedPages
from workers.messages.plan import EngineShape
from workers.model.attention import Attend
from workers.model.config import GrokConfig
from workers.model.parameters import Axes
from workers.model.partition import Partition

ROW_AXES: Axes = ("batch", None, "kv_heads", None)
TABLE_AXES: Axes = ("batch", None)

#: Pages of the keys and of the values. A batch group's pages of all layers are one row, layer by layer, so that kernels update
#: them where they lie.
Cache = tuple[Pages, Pages]


def page_axes(partition: Partition) -> Axes:
    """The first logical axes of pages: those of all groups are split with the batch, heads as keys and values are."""
    return ("kv_heads", "batch") if partition.kernels.heads_first else ("batch", "kv_heads")


def page_shapes(config: GrokConfig, shape: EngineShape, partition: Partition, dtype: jnp.dtype | type) -> Cache:
    """Shapes of all keys and values in `dtype`; int8 ones have a scale for each position of a head."""
    sharding, heads_first = partition.sharding(page_axes(partition)), partition.kernels.heads_first
    count = shape.groups * config.num_layers * shape.pages
    heads, size, page = config.num_kv_heads, config.key_size, shape.page_size

    def pages(*rest: int) -> Pages:
        lead = (heads, count) if heads_first else (count, heads)
        values: Any = jax.ShapeDtypeStruct((*lead, *rest), dtype, sharding=sharding)
        if dtype != jnp.int8:
            array: jax.Array = values
            return array
        scales: Any = jax.ShapeDtypeStruct((*lead, page), jnp.float32, sharding=sharding)
        return QuantizedPages(values, scales)

    return pages(page, size) if heads_first else pages(size, page), pages(page, size)


def paged_attend(config: GrokConfig, partition: Partition, table: jax.Array, positions: jax.Array) -> Attend:
    """The model's `attend` over a `Cache`: writes each layer's new keys and values to their pages, then attends to all pages.

    Args:
      config, partition: of the model.
      table: [B, N], pages local to the row's group and to the layer.
      positions: [B, T].
    """
    spec, axes = partition.spec, page_axes(partition)
    queries, rows, pages, tables = (
        spec(names) for names in (("batch", None, "q_heads", None), ROW_AXES, axes, TABLE_AXES)
    )
    attend = functools.partial(
        partition.kernels.attend,
        scale=config.attn_output_multiplier,
        cap=config.attn_logit_cap,
        rope_base=config.rope_base,
    )

    def local(
        layer: jax.Array,
        query: jax.Array,
        key: jax.Array,
        value: jax.Array,
        cache: Cache,
        table: jax.Array,
        positions: jax.Array,
    ) -> tuple[jax.Array, Cache]:
        count = jax.tree.leaves(cache)[0].shape[axes.index("batch")] // config.num_layers
        mixed, keys, values = attend(query, key, value, *cache, table + layer * count, positions)
        return mixed, (keys, values)

    operation = partition.on_parts(
        local,
        (PartitionSpec(), queries, rows, rows, (pages, pages), tables, tables),
        (queries, (pages, pages)),
    )

    def attend_layer(
        cache: Cache, layer: jax.Array, query: jax.Array, key: jax.Array, value: jax.Array
    ) -> tuple[jax.Array, Cache]:
        where = partition.everywhere(positions)
        result: tuple[jax.Array, Cache] = operation(layer, query, key, value, cache, table, where)
        return result

    return attend_layer
