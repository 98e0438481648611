"""The paged cache of keys and values, and how the model reads and writes it."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from workers.kernels.kv_pages import Pages, QuantizedPages
from workers.messages.plan import EngineShape
from workers.model.config import GrokConfig
from workers.model.parameters import Axes
from workers.model.partition import Partition

ROW_AXES: Axes = ("batch", None, "kv_heads", None)
TABLE_AXES: Axes = ("batch", None)

LayerPages = tuple[Pages, Pages]


def page_axes(partition: Partition) -> Axes:
    """The first logical axes of pages: those of all groups are split with the batch, heads as keys and values are."""
    axes: Axes = ("kv_heads", "batch") if partition.kernels.heads_first else ("batch", "kv_heads")
    if partition.kernels.scan_layers:
        axes = (*axes[: _layer_axis(partition)], None, *axes[_layer_axis(partition) :])
    return axes


def _layer_axis(partition: Partition) -> int:
    """Where the layers are in stacked pages: before the pages, so that the pages of all layers are one row of pages."""
    return 1 if partition.kernels.heads_first else 0


def page_shapes(
    config: GrokConfig, shape: EngineShape, partition: Partition, dtype: jnp.dtype | type
) -> tuple[LayerPages, ...]:
    """Shapes of each layer's keys and values in `dtype`, or of all layers' together where they lie stacked; int8 ones have a
    scale for each position of a head."""
    sharding, kernels = partition.sharding(page_axes(partition)), partition.kernels
    count, heads, size, page = shape.groups * shape.pages, config.num_kv_heads, config.key_size, shape.page_size

    def array(dims: tuple[int, ...], dtype: jnp.dtype | type) -> Any:
        if kernels.scan_layers:
            at = _layer_axis(partition)
            dims = (*dims[:at], config.num_layers, *dims[at:])
        return jax.ShapeDtypeStruct(dims, dtype, sharding=sharding)

    def pages(lead: tuple[int, int], rest: tuple[int, int]) -> Pages:
        values: jax.Array = array((*lead, *rest), dtype)
        return QuantizedPages(values, array((*lead, page), jnp.float32)) if dtype == jnp.int8 else values

    lead = (heads, count) if kernels.heads_first else (count, heads)
    both = pages(lead, (page, size) if kernels.heads_first else (size, page)), pages(lead, (page, size))
    return (both,) * (1 if kernels.scan_layers else config.num_layers)


@dataclasses.dataclass
class PagedAttend:
    """The model's `attend`: writes each layer's new keys and values to their pages, then attends to all pages.

    `pages` holds the updated arrays afterwards: of each layer, or stacked ones of all.
    """

    pages: list[LayerPages]
    table: jax.Array  # [B, N], pages local to the row's group
    positions: jax.Array  # [B, T]
    scale: float
    partition: Partition

    def __call__(self, layer: int | jax.Array, query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
        """[B, T, H, C], [B, T, K, C] twice -> [B, T, H, C]."""
        stacked = self.partition.kernels.scan_layers
        at = 0 if stacked else layer
        assert isinstance(at, int)
        key_pages, value_pages = self.pages[at]
        spec = self.partition.spec
        pages = spec(page_axes(self.partition))
        local = functools.partial(self.partition.kernels.attend, scale=self.scale)
        operation = self.partition.on_parts(
            functools.partial(self._in_stack, local) if stacked else lambda _, *arrays: local(*arrays),
            (
                PartitionSpec(),
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
        number = jnp.asarray(layer, jnp.int32)
        mixed: jax.Array
        mixed, *updated = operation(number, query, key, value, key_pages, value_pages, self.table, self.positions)
        self.pages[at] = (updated[0], updated[1])
        return mixed

    def _in_stack(
        self,
        attend: Callable[..., tuple[jax.Array, Pages, Pages]],
        layer: jax.Array,
        query: jax.Array,
        key: jax.Array,
        value: jax.Array,
        key_pages: Pages,
        value_pages: Pages,
        table: jax.Array,
        positions: jax.Array,
    ) -> tuple[jax.Array, Pages, Pages]:
        """A device's part: to `attend`, the pages of all layers are pages of one."""
        axis = _layer_axis(self.partition)
        stacked = key_pages, value_pages
        count = jax.tree.leaves(key_pages)[0].shape[axis + 1]
        flat = jax.tree.map(lambda leaf: leaf.reshape(*leaf.shape[:axis], -1, *leaf.shape[axis + 2 :]), stacked)
        mixed, *updated = attend(query, key, value, *flat, table + layer * count, positions)
        keys, values = jax.tree.map(lambda leaf, like: leaf.reshape(like.shape), tuple(updated), stacked)
        return mixed, keys, values
