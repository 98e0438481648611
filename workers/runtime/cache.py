"""The paged cache of keys and values, and how the model reads and writes it."""

from __future__ import annotations

import dataclasses
import functools

import jax

from workers.engine.plan import EngineShape
from workers.model.config import GrokConfig
from workers.model.parameters import Axes
from workers.model.partition import Partition

#: Pages of all groups, split with the batch; heads as the projections that make them.
PAGE_AXES: Axes = ("batch", "kv_heads", None, None)
ROW_AXES: Axes = ("batch", None, "kv_heads", None)
TABLE_AXES: Axes = ("batch", None)

LayerPages = tuple[jax.Array, jax.Array]


def page_shapes(config: GrokConfig, shape: EngineShape) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Of a layer's keys [groups * pages, K, C, page_size] and values [groups * pages, K, page_size, C]."""
    lead = (shape.groups * shape.pages, config.num_kv_heads)
    return (*lead, config.key_size, shape.page_size), (*lead, shape.page_size, config.key_size)


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
        operation = self.partition.on_parts(
            functools.partial(self.partition.kernels.attend, scale=self.scale),
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
