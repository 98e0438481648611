"""Which mesh axes each logical axis is split over, and the operations that need to know."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from workers.kernels.interface import PORTABLE, Kernels
from workers.kernels.packed import PackedTable, PackedWeight
from workers.kernels.weights import LayerWeight, QuantizedWeight, Table, Weight
from workers.model.config import GrokConfig
from workers.model.layout import RULES, Layout, MeshAxes, units
from workers.model.parameters import Axes


@dataclasses.dataclass(frozen=True)
class Partition(Layout):
    """A mesh of axes `data` and `model`, the rules by which a model lies on it, and the kernels that compute its parts.

    The mesh may be abstract, which is enough for tracing. Without a mesh nothing is split.
    """

    mesh: Mesh | AbstractMesh | None
    kernels: Kernels = PORTABLE

    @classmethod
    def create(
        cls,
        config: GrokConfig,
        mesh: Mesh | AbstractMesh | None = None,
        rules: str = "tensor",
        kernels: Kernels = PORTABLE,
    ) -> Partition:
        """The partition of a model on `mesh` by a table of RULES.

        A logical axis that its mesh axes do not divide evenly is not split (whole heads stay together); for the heads
        this decides for queries and keys alike, since a query head must lie beside its key head.
        """
        return cls(dict(mesh.shape) if mesh else {}, units(config), RULES[rules], mesh, kernels)

    def spec(self, axes: Axes) -> Any:
        """The partition of an array whose dimensions are the logical `axes`."""
        return PartitionSpec(*(self.axes(name) or None for name in axes))

    def sharding(self, axes: Axes) -> NamedSharding:
        """`spec`, on the mesh. There must be one."""
        assert self.mesh is not None
        return NamedSharding(self.mesh, self.spec(axes))

    def constrain(self, x: jax.Array, axes: Axes) -> jax.Array:
        """`x`, told to lie as `axes` say."""
        return x if self.mesh is None else lax.with_sharding_constraint(x, self.sharding(axes))

    def on_parts(self, local: Callable[..., Any], in_specs: Any, out_specs: Any) -> Callable[..., Any]:
        """`local` as a function of whole arrays: each device calls it on its parts. Without a mesh, `local` itself."""
        if self.mesh is None:
            return local
        return jax.shard_map(local, mesh=self.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)

    def sum(self, x: jax.Array, axes: MeshAxes) -> jax.Array:
        """Within `on_parts`: the sum of all devices' `x` along mesh `axes`, on each of them.

        Exact kernels promise that a row's bits don't depend on its place. An all-reduce may add the devices in an order that
        depends on the place in the buffer (gloo's ring does), so for them everything is gathered and added in rank order.
        """
        if not axes:
            return x
        if not self.kernels.batch_invariant:
            summed: jax.Array = lax.psum(x, axes)
            return summed
        parts = lax.all_gather(x, axes)  # [devices, ...]
        total: jax.Array = functools.reduce(jnp.add, parts[1:], parts[0])
        return total

    def weight_spec(self, weight: Weight, axes: Axes) -> Any:
        """The tree of specs that matches a weight."""
        if isinstance(weight, LayerWeight):
            return LayerWeight(self.weight_spec(weight.stacked, (None, *axes)), PartitionSpec())  # type: ignore[arg-type]
        if isinstance(weight, PackedWeight):
            scales = self.scale_axes(weight.scales.shape[-2], axes)
            return dataclasses.replace(weight, values=self.spec((*axes, None)), scales=self.spec(scales))
        if isinstance(weight, QuantizedWeight):
            scales = self.scale_axes(weight.scales.shape[-2], axes)
            return dataclasses.replace(weight, weight=self.spec(axes), scales=self.spec(scales))
        return self.spec(axes)

    def table_spec(self, table: Table) -> Any:
        """The tree of specs that matches an embedding table."""
        if isinstance(table, PackedTable):
            values, scales = self.spec((None, "vocab", None)), self.spec(("vocab", None))
            return dataclasses.replace(table, values=values, scales=scales)
        return self.spec(("vocab", "table_embed"))

    def norm(self, x: jax.Array, valid: jax.Array, scale: jax.Array, residual: jax.Array | None = None) -> jax.Array:
        """Root-mean-square norm of `x` [B, ..., D] times `scale` [D], in float32, added to `residual` if there is one."""
        rows, flags = self.spec(("batch", *(None,) * (x.ndim - 1))), self.spec(("batch", *(None,) * (x.ndim - 2)))

        def local(x: jax.Array, valid: jax.Array, scale: jax.Array, *residual: jax.Array) -> jax.Array:
            flat = [array.reshape(-1, x.shape[-1]) for array in (x, *residual)]
            return self.kernels.norm(flat[0], valid.reshape(-1), scale, *flat[1:]).reshape(x.shape)

        more = () if residual is None else (residual,)
        specs = (rows, flags, PartitionSpec(), *(rows for _ in more))
        normed: jax.Array = self.on_parts(local, specs, rows)(x, valid, scale, *more)
        return normed

    def route(
        self, x: jax.Array, valid: jax.Array, weight: jax.Array, selected: int
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Gates, experts and probabilities of rows `x` [M, D], whole on every device; see `Kernels.route`."""
        if self.axes("router_embed"):
            return self.kernels.route(x, valid, weight, selected)  # the compiler sums over the devices
        whole = PartitionSpec()
        local = functools.partial(self.kernels.route, selected=selected)
        routed: tuple[jax.Array, jax.Array, jax.Array]
        routed = self.on_parts(local, (whole,) * 3, (whole,) * 3)(x, valid, weight)
        return routed

    def lookup(self, table: Table, tokens: jax.Array) -> jax.Array:
        """Rows of `table` [V, D] for `tokens` [B, T]: [B, T, D], whole on every device."""

        def local(table: Table, tokens: jax.Array) -> jax.Array:
            over = self.axes("vocab")
            size = table.shape[0]
            first = lax.axis_index(over) * size if over else 0
            ours = (tokens >= first) & (tokens < first + size)
            rows = self.kernels.lookup(table, tokens - first)
            rows = jnp.where(ours[..., None], rows, 0)
            rows = self.sum(rows, over)
            columns = self.axes("table_embed")
            return lax.all_gather(rows, columns, axis=2, tiled=True) if columns else rows

        specs = (self.table_spec(table), self.spec((None, None)))
        result: jax.Array = self.on_parts(local, specs, self.spec((None, None, None)))(table, tokens)
        return result

    def tied_logits(self, hidden: jax.Array, valid: jax.Array, table: Table) -> jax.Array:
        """`hidden` [..., D] times the transposed `table` [V, D]: [..., V] float32, split as the table's vocabulary."""
        lead: Axes = (None,) * (hidden.ndim - 1)

        def local(hidden: jax.Array, valid: jax.Array, table: Table) -> jax.Array:
            flat = hidden.reshape(-1, hidden.shape[-1])
            product = self.kernels.logits(flat, valid.reshape(-1), table).reshape(*hidden.shape[:-1], -1)
            over = self.axes("table_embed")
            return self.sum(product, over)

        specs = (self.spec((*lead, "table_embed")), self.spec(lead), self.table_spec(table))
        result: jax.Array = self.on_parts(local, specs, self.spec((*lead, "vocab")))(hidden, valid, table)
        return result

    def project(
        self, x: jax.Array, valid: jax.Array, weights: tuple[Weight, ...], axes: tuple[Axes, ...]
    ) -> tuple[jax.Array, ...]:
        """`x` [B, T, K] times weights [K, N_i] with logical `axes`: [B, T, N_i] float32, N split as the weight's.

        Each device multiplies its part; a split K ends in one sum over its mesh axes. Rows stay split as the batch is,
        unless a weight is split over the same mesh axes. `valid` [B, T] is false for padding.
        """
        depth = axes[0][0]
        taken = {axis for pair in axes for name in pair for axis in self.axes(name)}
        rows = None if taken & {*self.axes("batch")} else "batch"

        def local(x: jax.Array, valid: jax.Array, *weights: Weight) -> tuple[jax.Array, ...]:
            flat = x.reshape(-1, x.shape[-1])
            products = self.kernels.project(flat, valid.reshape(-1), weights)
            products = tuple(product.reshape(*x.shape[:-1], -1) for product in products)
            over = self.axes(depth)
            return tuple(self.sum(product, over) for product in products)

        specs = (
            self.spec((rows, None, depth)),
            self.spec((rows, None)),
            *(self.weight_spec(weight, pair) for weight, pair in zip(weights, axes, strict=True)),
        )
        outs = tuple(self.spec((rows, None, pair[1])) for pair in axes)
        results: tuple[jax.Array, ...] = self.on_parts(local, specs, outs)(x, valid, *weights)
        return results
