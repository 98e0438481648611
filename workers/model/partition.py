"""How a model lies on the devices of a mesh: specs of its arrays, functions of their parts, sums over devices."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from workers.kernels.interface import PORTABLE, Group, Kernels, Site
from workers.kernels.packed import PackedTable, PackedWeight
from workers.kernels.weights import LayerWeight, PairedWeight, QuantizedWeight, Table, Weight
from workers.model.config import GrokConfig
from workers.model.layout import RULES, Layout, MeshAxes, units
from workers.model.parameters import Axes

#: Bytes that a device gathers for a sum; of more, each device adds up a part.
_GATHERED = 4 << 20


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
        """`x`, laid out by `axes`."""
        return x if self.mesh is None else lax.with_sharding_constraint(x, self.sharding(axes))

    def everywhere(self, x: jax.Array) -> jax.Array:
        """`x`, which every device has as a whole: else the compiler splits it for one use and gathers it for others."""
        return self.constrain(x, (None,) * x.ndim)

    def on_parts(self, local: Callable[..., Any], in_specs: Any, out_specs: Any) -> Callable[..., Any]:
        """`local` as a function of whole arrays: each device calls it on its parts. Without a mesh, `local` itself."""
        if self.mesh is None:
            return local
        return jax.shard_map(local, mesh=self.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)

    def sum(self, x: jax.Array, axes: MeshAxes, site: Site, dtype: jnp.dtype | None = None) -> jax.Array:
        """Within `on_parts`: the sum of all devices' `x` along mesh `axes`, on each of them. On accelerators whose kernels
        aren't exact much crosses in `dtype`, as in xAI's code.

        Exact kernels promise that a row's bits don't depend on its place. An all-reduce may add the devices in an order that
        depends on the place in the buffer (gloo's and NCCL's rings do), so for them everything is added in rank order: few
        bytes by each device; of many, each adds some columns, for as many bytes as a ring.
        """
        if not axes:
            return x
        if self.kernels.collectives is not None:
            return self.kernels.collectives.sum(x, self._group(axes, site))
        if not self.kernels.batch_invariant:
            summed: jax.Array = lax.psum(x.astype(dtype) if dtype and self._is_much(x) else x, axes)
            return summed.astype(x.dtype)
        ways, columns = self.ways(axes), x.shape[-1]
        if ways * x.size * x.dtype.itemsize > _GATHERED and columns % ways == 0:
            split = x.reshape(*x.shape[:-1], ways, columns // ways)
            own = _added(lax.all_to_all(split, axes, x.ndim - 1, 0))  # [..., columns / devices]
            whole: jax.Array = lax.all_gather(own, axes, axis=x.ndim - 1, tiled=True)
            return whole
        return _added(lax.all_gather(x, axes))

    def keeps_apart(self, x: jax.Array) -> bool:
        """Whether what only a group's rows are wanted for is computed of its rows only: of many rows `x` [M, D], split as the
        batch is."""
        owners = self.axes("batch")
        return bool(owners) and {*owners} <= {*self.axes("ffn")} and not self.axes("embed") and self._is_much(x)

    def sum_of_owners(self, x: jax.Array, axes: MeshAxes, site: Site, dtype: jnp.dtype) -> jax.Array:
        """Within `on_parts`: of the sum of all devices' `x` [M, D] along mesh `axes` the rows of this device's batch group, as
        `sum` takes it. Other groups' rows cross once, not as often as a sum on all devices takes."""
        owners = self.axes("batch")
        own = lax.psum_scatter(x.astype(dtype), owners, scatter_dimension=0, tiled=True)  # [M / groups, D]
        return self.sum(own, tuple(axis for axis in axes if axis not in owners), site).astype(x.dtype)

    def _is_much(self, x: jax.Array) -> bool:
        """Of float32 rows, whether they are to cross in fewer bytes."""
        inexact = self.kernels.accelerator and not self.kernels.batch_invariant
        return inexact and x.size * x.dtype.itemsize > _GATHERED

    def gather(self, x: jax.Array, axes: MeshAxes, site: Site) -> jax.Array:
        """Within `on_parts`: the rows [B, ...] of all devices along mesh `axes`, in their order."""
        if not axes:
            return x
        if self.kernels.collectives is None:
            rows: jax.Array = lax.all_gather(x, axes, tiled=True)
            return rows
        return self.kernels.collectives.gather(x, self._group(axes, site)).reshape(-1, *x.shape[1:])

    def exchange(self, x: jax.Array, axes: MeshAxes, site: Site) -> jax.Array:
        """Within `on_parts`: from some columns of rows, [B, V / devices], to all of some rows, [B / devices, V]."""
        if self.kernels.collectives is not None:
            return self.kernels.collectives.exchange(x, self._group(axes, site))
        rows: jax.Array = lax.all_to_all(x, axes, split_axis=0, concat_axis=1, tiled=True)
        return rows

    def whole(self, x: jax.Array, site: Site) -> jax.Array:
        """`x` [B, ...], whose rows may be split as the batch is, on each device."""
        axes = self.axes("batch")
        if not axes:
            return x
        rows: jax.Array = self.on_parts(lambda x: self.gather(x, axes, site), self.spec(("batch",)), self.spec(()))(x)
        return rows

    def _group(self, axes: MeshAxes, site: Site) -> Group:
        """Of this device, along mesh `axes`, which must follow each other in the mesh."""
        assert self.mesh is not None
        names = self.mesh.axis_names
        last = names.index(axes[-1]) + 1
        assert names[last - len(axes) : last] == axes
        rank = jnp.asarray(lax.axis_index(names), jnp.int32)
        return Group(site, rank, self.mesh.size, self.ways(axes), self.ways(names[last:]))

    def weight_spec(self, weight: Weight, axes: Axes) -> Any:
        """The tree of specs that matches a weight."""
        if isinstance(weight, LayerWeight):
            return LayerWeight(self.weight_spec(weight.stacked, (None, *axes)), PartitionSpec())  # type: ignore[arg-type]
        if isinstance(weight, PackedWeight):
            scales = self.scale_axes(weight.scales.shape[-2], axes)
            return dataclasses.replace(weight, values=self.spec((*axes, None)), scales=self.spec(scales))
        if isinstance(weight, PairedWeight):
            scales = self.scale_axes(weight.scales.shape[-2], axes)
            return dataclasses.replace(weight, pairs=self.spec(axes), scales=self.spec(scales))
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


def _added(parts: jax.Array) -> jax.Array:
    """The sum of [devices, ...] in their order."""
    total: jax.Array = functools.reduce(jnp.add, parts[1:], parts[0])
    return total
