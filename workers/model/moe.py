"""The mixture of experts: a router picks two of eight gated networks for each position."""

from __future__ import annotations

import haiku as hk
import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from workers.kernels.weights import Weight
from workers.model.config import GrokConfig
from workers.model.linear import LinearWeight
from workers.model.parameters import Axes
from workers.model.partition import Partition

WIDEN_AXES: Axes = ("expert", "embed", "ffn")
NARROW_AXES: Axes = ("expert", "ffn", "embed")


class Router(hk.Module):
    """Chooses experts: softmax in float32 over **all** experts, then the largest ones, not normalised again."""

    def __init__(self, config: GrokConfig, partition: Partition, name: str = "router") -> None:
        super().__init__(name=name)
        self._config = config
        self._partition = partition

    def __call__(self, x: jax.Array, valid: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """[M, D] float, [M] bool -> gates [M, S] float32, experts [M, S] int32, probabilities [M, E] float32."""
        c = self._config
        init = hk.initializers.TruncatedNormal(1.0 / c.emb_size**0.5)
        weight = hk.get_parameter("w", [c.emb_size, c.num_experts], jnp.float32, init=init)
        return self._partition.route(x, valid, weight, c.num_selected_experts)


class Experts(hk.Module):
    """The experts' networks: down(gelu(gate(x)) * up(x)), named `linear_1`, `linear` and `linear_v` by xAI.

    Shapes: M rows, S selected of E experts, D emb_size, F ffn_size.
    """

    def __init__(self, config: GrokConfig, partition: Partition, name: str = "moe") -> None:
        super().__init__(name=name)
        self._config = config
        self._partition = partition

    def __call__(self, x: jax.Array, gates: jax.Array, experts: jax.Array, valid: jax.Array) -> jax.Array:
        """Sum over the selected experts of gate * expert(x). Rows that are not valid cost nothing and give zeros.

        Args:
          x: [M, D].
          gates: [M, S] float32.
          experts: [M, S] int32.
          valid: [M] bool.

        Returns:
          [M, D] float32. Products are taken in x's dtype.
        """
        c = self._config
        widen, narrow = (c.num_experts, c.emb_size, c.ffn_size), (c.num_experts, c.ffn_size, c.emb_size)
        gate = LinearWeight("linear")(widen)
        up = LinearWeight("linear_v")(widen)
        down = LinearWeight("linear_1")(narrow)
        partition = self._partition
        rows = PartitionSpec(None, partition.axes("embed") or None)
        specs = (
            rows,
            *(PartitionSpec(),) * 3,
            partition.weight_spec(gate, WIDEN_AXES),
            partition.weight_spec(up, WIDEN_AXES),
            partition.weight_spec(down, NARROW_AXES),
        )
        mixed: jax.Array = partition.on_parts(self._local, specs, rows)(x, gates, experts, valid, gate, up, down)
        return mixed

    def _local(
        self,
        x: jax.Array,
        gates: jax.Array,
        experts: jax.Array,
        valid: jax.Array,
        gate: Weight,
        up: Weight,
        down: Weight,
    ) -> jax.Array:
        """One device's part: all rows, this device's experts and slices of their weights, one sum over devices."""
        partition = self._partition
        expert_axes, embed_axes = partition.axes("expert"), partition.axes("embed")
        first = lax.axis_index(expert_axes) * gate.shape[0] if expert_axes else jnp.int32(0)

        def reduce(products: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            gated, lifted = products
            return partition.sum(gated, embed_axes), partition.sum(lifted, embed_axes)

        mixed = partition.kernels.experts(
            x, gates, experts, valid, first, gate, up, down, reduce if embed_axes else None
        )
        return partition.sum(mixed, (*partition.axes("ffn"), *expert_axes))
