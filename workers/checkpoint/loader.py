"""Streams a checkpoint to the devices of a mesh, each host reading only the bytes of its own shards."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from workers.checkpoint.checkpoint import Checkpoint
from workers.checkpoint.tensor_file import ArraySpan, TensorFile
from workers.model.packed import PackedTable, PackedWeight, pack, pack_table, packed_shape
from workers.model.parameters import Axes, ParameterInfo
from workers.model.partition import Partition
from workers.model.quantized import QuantizedWeight, Table, Weight

Params = dict[str, dict[str, Weight | Table]]
Index = tuple[slice, ...]
Array = np.ndarray[Any, np.dtype[Any]]

#: How weights are kept on the devices: as stored, or widened while they load. Unrounded ones are for native kernels only.
WEIGHT_DTYPES = {"int8": None, "int8-unrounded": None, "bfloat16": jnp.bfloat16, "float32": jnp.float32}

EMBEDDING = "language_model/in_out_embed/embeddings"


@dataclasses.dataclass
class LoadProgress:
    """Counts what this host has read. `read` are bytes of payload, each counted once however many devices hold it."""

    total: int
    read: int = 0
    tensors: int = 0


def load_parameters(
    checkpoint: Checkpoint,
    partition: Partition,
    *,
    weights: str = "int8",
    dtype: jnp.dtype | type = jnp.float32,
    report: Callable[[LoadProgress], None] = lambda _: None,
) -> tuple[Params, LoadProgress]:
    """Loads all parameters onto the partition's mesh; every host of the mesh calls this alike.

    One tensor is mapped at a time, and of it only this host's slices are copied.

    Args:
      checkpoint: what to load.
      partition: with a mesh.
      weights: a key of WEIGHT_DTYPES.
      dtype: of the activations, and of the embedding table, which is cast to it. Native kernels pack weights and table
        as they need them, whatever this and `weights` are.
      report: called after each tensor.

    Returns:
      The parameters as Haiku's nested dictionary, and the final counts.
    """
    progress = LoadProgress(total=checkpoint.nbytes)
    params: Params = {}
    packed = partition.kernels.packed
    for info, file in checkpoint.tensors:
        module, name = info.path.rsplit("/", 1)
        widen = WEIGHT_DTYPES[weights]
        reader = _Reader(file, progress)
        value: Weight | Table
        if info.path == EMBEDDING:
            value = reader.packed_table(info, partition) if packed else reader.array(info, partition, dtype)
        elif file.scales is None:
            value = reader.array(info, partition, widen if info.quantized else None)
        elif packed:
            value = reader.packed(info, file.scales, partition, rounded=weights == "int8")
        elif widen is None:
            value = reader.quantized(info, file.scales, partition)
        else:
            value = reader.dequantized(info, file.scales, partition, widen)
        params.setdefault(module, {})[name] = value
        progress.tensors += 1
        report(progress)
    return params, progress


def parameter_shapes(
    checkpoint: Checkpoint, partition: Partition, *, weights: str = "int8", dtype: jnp.dtype | type = jnp.float32
) -> Params:
    """The shapes, types and places of what `load_parameters` will return, for compiling before anything is loaded."""
    shapes: Params = {}
    for info, file in checkpoint.tensors:
        module, name = info.path.rsplit("/", 1)
        shapes.setdefault(module, {})[name] = _shape(info, file, partition, weights, dtype)
    return shapes


def _shape(info: ParameterInfo, file: TensorFile, partition: Partition, weights: str, dtype: Any) -> Any:
    def array(shape: tuple[int, ...], dtype: Any, axes: Axes) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=partition.sharding(axes))

    span, widen = file.values, WEIGHT_DTYPES[weights]
    if info.path == EMBEDDING:
        if not partition.kernels.packed:
            return array(span.shape, dtype, info.axes)
        ways = partition.ways(partition.axes(info.axes[0]))
        blocks, strips, size = packed_shape(span.shape[1], span.shape[0] // ways, 1, planes=2)
        values = array((blocks, strips * ways, size), jnp.int8, (None, *info.axes))
        scales = array((span.shape[0], 1), jnp.float32, (info.axes[0], None))
        return PackedTable(values, scales, span.shape[-1])  # type: ignore[arg-type]
    if file.scales is None:
        return array(span.shape, widen if info.quantized and widen else span.dtype, info.axes)
    if not partition.kernels.packed and widen is not None:
        return array(span.shape, widen, info.axes)
    *_, rows, columns = info.axes
    kept = partition.scale_groups(file.scales.shape[-2], rows)
    scale_shape = (*file.scales.shape[:-2], kept, file.scales.shape[-1])
    scales = array(scale_shape, file.scales.dtype, partition.scale_axes(kept, info.axes))
    if not partition.kernels.packed:
        return QuantizedWeight(array(span.shape, span.dtype, info.axes), scales)  # type: ignore[arg-type]
    row_ways, column_ways = (partition.ways(partition.axes(axis)) for axis in (rows, columns))
    local = span.shape[-2] // row_ways, span.shape[-1] // column_ways
    blocks, strips, size = packed_shape(*local, max(1, kept // row_ways))
    shape = (*span.shape[:-2], blocks * row_ways, strips * column_ways, size)
    values = array(shape, jnp.int8, (*info.axes, None))
    return PackedWeight(values, scales, span.shape[-2], weights == "int8")  # type: ignore[arg-type]


class _Reader:
    """Reads slices of one tensor file, each once, and counts their bytes."""

    def __init__(self, file: TensorFile, progress: LoadProgress) -> None:
        self._file = file
        self._progress = progress
        self._read: dict[tuple[int, tuple[tuple[int, int], ...]], Array] = {}

    def array(self, info: ParameterInfo, partition: Partition, dtype: Any) -> jax.Array:
        span = self._file.values

        def shard(index: Index) -> Array:
            part = self._slice(span, index)
            return part if dtype is None else part.astype(dtype)

        return self._place(span.shape, partition, info.axes, shard)

    def quantized(self, info: ParameterInfo, scales: ArraySpan, partition: Partition) -> QuantizedWeight:
        return QuantizedWeight(self.array(info, partition, None), self._scales(info, scales, partition))

    def packed(self, info: ParameterInfo, scales: ArraySpan, partition: Partition, rounded: bool) -> PackedWeight:
        span = self._file.values
        placed = self._scales(info, scales, partition)
        parts = partition.ways(partition.axes(info.axes[-2]))
        groups = max(1, placed.shape[-2] // parts)
        (values,) = self._pack(
            info, partition, [(*info.axes, None)], lambda index: (pack(self._slice(span, index), groups),)
        )
        return PackedWeight(values, placed, span.shape[-2], rounded)

    def packed_table(self, info: ParameterInfo, partition: Partition) -> PackedTable:
        span = self._file.values
        rows, _ = info.axes
        axes: list[Axes] = [(None, rows, None), (rows, None)]
        values, scales = self._pack(info, partition, axes, lambda index: pack_table(self._slice(span, index)))
        return PackedTable(values, scales, span.shape[-1])

    def _pack(
        self, info: ParameterInfo, partition: Partition, axes: list[Axes], make: Callable[[Index], tuple[Array, ...]]
    ) -> list[jax.Array]:
        """One array for each of `axes`, whose parts `make` makes from the slices that each device holds of this tensor."""
        sharding = partition.sharding(info.axes)
        slices = sharding.addressable_devices_indices_map(self._file.values.shape)
        made: dict[str, tuple[Array, ...]] = {}
        parts: list[list[jax.Array]] = []
        for device, index in slices.items():
            assert index is not None
            if str(index) not in made:
                made[str(index)] = make(index)
            parts.append([jax.device_put(part, device) for part in made[str(index)]])
        arrays: list[jax.Array] = []
        for pieces, names in zip(zip(*parts, strict=True), axes, strict=True):
            ways = [partition.ways(partition.axes(name)) for name in names]
            shape = tuple(n * parts for n, parts in zip(pieces[0].shape, ways, strict=True))
            arrays.append(jax.make_array_from_single_device_arrays(shape, partition.sharding(names), list(pieces)))
        jax.block_until_ready(arrays)
        return arrays

    def _scales(self, info: ParameterInfo, scales: ArraySpan, partition: Partition) -> jax.Array:
        groups = scales.shape[-2]
        kept = partition.scale_groups(groups, info.axes[-2])

        def scale_shard(index: Index) -> Array:
            first, stop, _ = index[-2].indices(kept)
            repeats = kept // groups
            source = slice(first // repeats, -(-stop // repeats))
            rows = np.arange(first, stop) // repeats - source.start
            return self._slice(scales, (*index[:-2], source, index[-1]))[..., rows, :]

        shape = (*scales.shape[:-2], kept, scales.shape[-1])
        return self._place(shape, partition, partition.scale_axes(kept, info.axes), scale_shard)

    def dequantized(self, info: ParameterInfo, scales: ArraySpan, partition: Partition, dtype: Any) -> jax.Array:
        values = self._file.values
        group_rows = values.shape[-2] // scales.shape[-2]

        def shard(index: Index) -> Array:
            first, stop, _ = index[-2].indices(values.shape[-2])
            source = slice(first // group_rows, -(-stop // group_rows))
            rows = np.arange(first, stop) // group_rows - source.start
            factors = self._slice(scales, (*index[:-2], source, index[-1]))[..., rows, :]
            # Rounded to bfloat16, whatever the type: see `workers.model.quantized.dequantize`.
            products = self._slice(values, index).astype(np.float32) * factors.astype(np.float32)
            return products.astype(jnp.bfloat16).astype(dtype)

        return self._place(values.shape, partition, info.axes, shard)

    def _place(
        self, shape: tuple[int, ...], partition: Partition, axes: Axes, shard: Callable[[Index], Array]
    ) -> jax.Array:
        def callback(index: Index | None) -> Array:
            assert index is not None
            return shard(index)

        placed = jax.make_array_from_callback(shape, partition.sharding(axes), callback)
        jax.block_until_ready(placed)
        return placed

    def _slice(self, span: ArraySpan, index: Index) -> Array:
        """A copy of the slice `index` of an array in the file."""
        bounds = tuple(s.indices(n)[:2] for s, n in zip(index, span.shape, strict=True))
        key = (span.offset, bounds)
        if key not in self._read:
            self._read[key] = np.array(self._file.map(span)[index])
            self._progress.read += math.prod(b - a for a, b in bounds) * span.dtype.itemsize
        return self._read[key]
