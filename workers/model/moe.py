"""The mixture of experts: a router picks two of eight gated networks for each position."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import haiku as hk
import jax
from jax.sharding import PartitionSpec

from workers.kernels.interface import Site
from workers.kernels.weights import Weight
from workers.model.config import GrokConfig
from workers.model.linear import LinearWeight
from workers.model.parameters import Axes
from workers.model.partition import Partition

WIDEN_AXES: Axes = (None, "embed", "ffn")
NARROW_AXES: Axes = (None, "ffn", "embed")


class Router(hk.Module):
    """Chooses experts: softmax in float32 over **all** experts, then the largest ones, not normalised again."""

    def __init__(self, config: GrokConfig, partition: Partition, name: str = "router") -> None:
        super().__init__(name=name)
        self._config = config
        self._partition = partition

    def __call__(self, x: jax.Array, valid: jax.Array, apart: bool) -> tuple[jax.Array, jax.Array, jax.Array]:
        """[M, D] float, [M] bool -> gates [M, S] float32, experts [M, S] int32, probabilities [M, E] float32; all of them on
        every device, or each group's on its own ones if rows are kept `apart`."""
        c, partition = self._config, self._partition
        weight = hk.get_parameter("w", [c.emb_size, c.num_experts])
        route: Callable[..., Any] = functools.partial(partition.kernels.route, selected=c.num_selected_experts)
        if not partition.axes("router_embed"):  # else the compiler sums over the devices
            rows = partition.spec(("batch" if apart else None,))
            route = partition.on_parts(route, (rows, rows, PartitionSpec()), (rows,) * 3)
        routed: tuple[jax.Array, jax.Array, jax.Array] = route(x, valid, weight)
        return routed


class Experts(hk.Module):
    """The experts' networks: down(gelu(gate(x)) * up(x)), named `linear_1`, `linear` and `linear_v` by xAI.

    Shapes: M rows, S selected of E experts, D emb_size, F ffn_size.
    """

    def __init__(self, config: GrokConfig, partition: Partition, name: str = "moe") -> None:
        super().__init__(name=name)
        self._config = config
        self._partition = partition

    def __call__(self, x: jax.Array, gates: jax.Array, experts: jax.Array, valid: jax.Array, apart: bool) -> jax.Array:
        """Sum over the selected experts of gate * expert(x). Rows that are not valid cost nothing and give zeros.

        Args:
          x: [M, D].
          gates: [M, S] float32.
          experts: [M, S] int32.
          valid: [M] bool.
          apart: whether each device gets its own group's results only.

        Returns:
          [M, D] float32. Products are taken in x's dtype.
        """
        c, partition = self._config, self._partition
        widen, narrow = (c.num_experts, c.emb_size, c.ffn_size), (c.num_experts, c.ffn_size, c.emb_size)
        gate = LinearWeight("linear")(widen)
        up = LinearWeight("linear_v")(widen)
        down = LinearWeight("linear_1")(narrow)
        rows = partition.spec((None, "embed"))
        specs = (
            rows,
            *(PartitionSpec(),) * 3,
            partition.weight_spec(gate, WIDEN_AXES),
            partition.weight_spec(up, WIDEN_AXES),
            partition.weight_spec(down, NARROW_AXES),
        )
        local = functools.partial(self._local, apart)
        out = partition.spec(("batch", None)) if apart else rows
        mixed: jax.Array = partition.on_parts(local, specs, out)(x, gates, experts, valid, gate, up, down)
        return mixed

    def _local(
        self,
        apart: bool,
        x: jax.Array,
        gates: jax.Array,
        experts: jax.Array,
        valid: jax.Array,
        gate: Weight,
        up: Weight,
        down: Weight,
    ) -> jax.Array:
        """One device's part: all rows, slices of all experts' weights, one sum over devices; of its group's rows if `apart`."""
        partition = self._partition
        embed_axes = partition.axes("embed")

        def reduce(products: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            gated, lifted = products
            return partition.sum(gated, embed_axes, Site.EXPERTS), partition.sum(lifted, embed_axes, Site.EXPERTS)

        mixed = partition.kernels.experts(x, gates, experts, valid, gate, up, down, reduce if embed_axes else None)
        add = partition.sum_of_owners if apart else partition.sum
        return add(mixed, partition.axes("ffn"), Site.EXPERTS, x.dtype)
