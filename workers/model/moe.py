"""The mixture of experts: a router picks two of eight gated networks for each position."""

from __future__ import annotations

from collections.abc import Callable

import haiku as hk
import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from workers.model.config import GrokConfig
from workers.model.linear import weight_parameter
from workers.model.parameters import Axes
from workers.model.partition import Partition
from workers.model.quantized import Weight

#: (x [M, K] sorted by group, weight [G, K, N], group_sizes [G]) -> [M, N]
GroupedMatmul = Callable[[jax.Array, Weight, jax.Array], jax.Array]

WIDEN_AXES: Axes = ("expert", "embed", "ffn")
NARROW_AXES: Axes = ("expert", "ffn", "embed")


class Router(hk.Module):
    """Chooses experts: softmax in float32 over **all** experts, then the largest ones, not normalised again."""

    def __init__(self, config: GrokConfig, name: str = "router") -> None:
        super().__init__(name=name)
        self._config = config

    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """[M, D] float -> gates [M, S] float32, experts [M, S] int32, probabilities [M, E] float32."""
        c = self._config
        init = hk.initializers.TruncatedNormal(1.0 / c.emb_size**0.5)
        weight = hk.get_parameter("w", [c.emb_size, c.num_experts], jnp.float32, init=init)
        # The highest precision: accelerators otherwise multiply float32 as bfloat16, and choose other experts.
        logits = jnp.matmul(x.astype(jnp.float32), weight.astype(jnp.float32), precision=lax.Precision.HIGHEST)
        probabilities = jax.nn.softmax(logits)
        gates, experts = lax.top_k(probabilities, c.num_selected_experts)
        return gates, experts, probabilities


class Experts(hk.Module):
    """The experts' networks: down(gelu(gate(x)) * up(x)), named `linear_1`, `linear` and `linear_v` by xAI.

    Shapes: M rows, S selected of E experts, D emb_size, F ffn_size.
    """

    def __init__(
        self, config: GrokConfig, partition: Partition, grouped_matmul: GroupedMatmul, name: str = "moe"
    ) -> None:
        super().__init__(name=name)
        self._config = config
        self._partition = partition
        self._grouped_matmul = grouped_matmul

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
        gate = _Weight("linear")(widen)
        up = _Weight("linear_v")(widen)
        down = _Weight("linear_1")(narrow)
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
        partition, selected = self._partition, experts.shape[1]
        local_experts = gate.shape[0]
        expert_axes, embed_axes = partition.axes("expert"), partition.axes("embed")
        first = lax.axis_index(expert_axes) * local_experts if expert_axes else 0
        flat = experts.reshape(-1) - first  # [M * S]
        ours = jnp.repeat(valid, selected) & (flat >= 0) & (flat < local_experts)
        flat = jnp.where(ours, flat, local_experts)
        order = jnp.argsort(flat, stable=True)  # rows by expert, those of no expert here last
        sizes = jnp.bincount(flat, length=local_experts + 1)[:local_experts].astype(jnp.int32)
        taken = x[order // selected]  # [M * S, D]

        gated = self._grouped_matmul(taken, gate, sizes)  # [M * S, F]
        lifted = self._grouped_matmul(taken, up, sizes)  # [M * S, F]
        if embed_axes:
            gated, lifted = lax.psum((gated, lifted), embed_axes)
        hidden = (jax.nn.gelu(gated, approximate=True) * lifted).astype(x.dtype)
        results = self._grouped_matmul(hidden, down, sizes)  # [M * S, D]

        results = jnp.zeros_like(results).at[order].set(results, unique_indices=True)
        results = jnp.where(ours[:, None], results, 0.0).reshape(*experts.shape, -1)  # [M, S, D]
        mixed = jnp.sum(results * gates[..., None], axis=1)  # [M, D]
        over = (*partition.axes("ffn"), *expert_axes)
        return lax.psum(mixed, over) if over else mixed


class _Weight(hk.Module):
    """Holds one expert weight under the module name that xAI's tree gives it."""

    def __call__(self, shape: tuple[int, ...]) -> Weight:
        return weight_parameter(shape)
