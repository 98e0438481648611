"""Streams a checkpoint to the devices of a mesh, each host reading only the bytes of its own shards."""

from __future__ import annotations

import collections
import concurrent.futures
import functools
import itertools
import math
import re
import threading
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from workers.checkpoint.checkpoint import Checkpoint
from workers.checkpoint.digests import digest, part_name, source_groups
from workers.checkpoint.errors import CheckpointError
from workers.checkpoint.reading import Bounds, read_slice
from workers.checkpoint.tensor_file import ArraySpan, TensorFile
from workers.kernels.packed import PackedTable, PackedWeight, pack_table, packed_shape
from workers.kernels.weights import QuantizedWeight, Table, Weight
from workers.model.config import GrokConfig
from workers.model.grok import STACKED_LAYERS
from workers.model.parameters import Axes, ParameterInfo
from workers.model.partition import Partition

Params = dict[str, dict[str, Weight | Table]]
Index = tuple[slice, ...]
Array = np.ndarray[Any, np.dtype[Any]]

#: How weights are kept on the devices: as stored, or widened while they load. Unrounded ones are for native kernels only.
WEIGHT_DTYPES = {"int4": None, "int8": None, "int8-unrounded": None, "bfloat16": jnp.bfloat16, "float32": jnp.float32}

#: Tensors that are loaded at a time: while one is read, another is packed.
THREADS = 4
#: Seconds between reports while bytes come.
REPORT_SECONDS = 1.0
#: Tensors that are loaded, or wait to be, before the first of them must have its place.
AHEAD = 6

_LAYER = re.compile(r"decoder_layer_(\d+)/")

EMBEDDING = "language_model/in_out_embed/embeddings"


class LoadProgress:
    """Counts what this host reads. Bytes of payload, each counted once however many devices hold it."""

    def __init__(self, total: int, report: Callable[[LoadProgress], None]) -> None:
        """`report` is called about once a second while bytes come."""
        self._report = report
        self._reported = time.monotonic()
        #: Bytes that this host reads in all.
        self.total = total
        self.read = 0
        self.tensors = 0
        #: Of each part of an array that a device holds, by its name; see `digests`.
        self.digests: dict[str, int] = {}
        self._lock = threading.Lock()

    def add(self, count: int = 0, tensors: int = 0) -> None:
        """Notes what was read."""
        with self._lock:
            self.read += count
            self.tensors += tensors
            if tensors or time.monotonic() - self._reported > REPORT_SECONDS:
                self._reported = time.monotonic()
                self._report(self)


def load_parameters(
    checkpoint: Checkpoint,
    partition: Partition,
    *,
    weights: str = "int8",
    dtype: jnp.dtype | type = jnp.float32,
    report: Callable[[LoadProgress], None] = lambda _: None,
) -> tuple[Params, LoadProgress]:
    """Loads all parameters onto the partition's mesh; every host of the mesh calls this alike.

    THREADS tensors at a time are read, of each only this host's slices, turned into what the devices keep, and placed.

    Args:
      checkpoint: what to load.
      partition: with a mesh.
      weights: a key of WEIGHT_DTYPES.
      dtype: of the activations, and of the embedding table, which is cast to it. Native kernels pack weights and table
        as they need them, whatever this and `weights` are.
      report: called after each tensor, and about once a second, by any thread.

    Returns:
      The parameters as Haiku's nested dictionary, and the final counts.

    Raises:
      CheckpointError: a file can't be read.
    """
    progress = LoadProgress(local_bytes(checkpoint, partition), report)
    params: Params = {}

    def load(tensor: tuple[ParameterInfo, TensorFile]) -> Weight | Table:
        info, file = tensor
        try:
            return _load(info, _Reader(info, file, partition, progress), file.scales, partition, weights, dtype)
        except OSError as error:
            raise CheckpointError(file.path, f"can't be read: {error}", tensor=info.path) from error

    with concurrent.futures.ThreadPoolExecutor(THREADS, "load") as pool:
        # No more at a time: what has been loaded is kept twice until it lies among its layers.
        tensors = iter(checkpoint.tensors)
        loading = collections.deque((t[0], pool.submit(load, t)) for t in itertools.islice(tensors, AHEAD))
        try:
            while loading:
                info, value = loading.popleft()
                _put(params, info, value.result(), checkpoint.config, partition)
                del value
                loading.extend((t[0], pool.submit(load, t)) for t in itertools.islice(tensors, 1))
                progress.add(tensors=1)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return params, progress


def _put(params: Params, info: ParameterInfo, value: Any, config: GrokConfig, partition: Partition) -> None:
    """Notes a parameter, or its shape, under its name; where layers lie stacked, in its place among those of all layers."""
    layer = _LAYER.search(info.path)
    path = info.path
    if partition.kernels.scan_layers and layer:
        path = _LAYER.sub(f"{STACKED_LAYERS}/", path)
    module, name = path.rsplit("/", 1)
    known = params.setdefault(module, {})
    if path != info.path and layer:
        if name not in known:
            known[name] = jax.tree.map(lambda leaf: _stack(leaf, config.num_layers), value)
        if isinstance(jax.tree.leaves(value)[0], jax.Array):
            known[name] = jax.block_until_ready(_insert(known[name], value, int(layer[1])))
    else:
        known[name] = value


def _stack(leaf: Any, layers: int) -> Any:
    """Room for an array of all layers, or its shape."""
    spec = PartitionSpec(None, *leaf.sharding.spec)
    sharding = NamedSharding(leaf.sharding.mesh, spec)
    shape = (layers, *leaf.shape)
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(shape, leaf.dtype, sharding=sharding)
    return jnp.zeros(shape, leaf.dtype, device=sharding)


@functools.partial(jax.jit, donate_argnums=0)
def _insert(stacked: Any, value: Any, layer: int) -> Any:
    """`stacked` [L, ...] with `value` [...] as that of a layer."""
    return jax.tree.map(lambda all_, one: lax.dynamic_update_index_in_dim(all_, one, layer, 0), stacked, value)


def _load(
    info: ParameterInfo, reader: _Reader, scales: ArraySpan | None, partition: Partition, weights: str, dtype: Any
) -> Weight | Table:
    packed, widen = partition.kernels.packed, WEIGHT_DTYPES[weights]
    if info.path == EMBEDDING:
        return reader.packed_table(info, partition) if packed else reader.array(info, partition, dtype)
    if scales is None:
        return reader.array(info, partition, widen if info.quantized else None)
    if packed:
        return reader.packed(info, scales, partition, rounded=weights == "int8")
    if weights == "int4":
        return reader.int4(info, scales, partition)
    if widen is None:
        return reader.quantized(info, scales, partition)
    return reader.dequantized(info, scales, partition, widen)


def local_bytes(checkpoint: Checkpoint, partition: Partition) -> int:
    """Bytes of payload that this host reads: each part that any of its devices holds, once."""
    total = 0
    for info, file in checkpoint.tensors:
        devices = partition.sharding(info.axes).addressable_devices_indices_map(file.values.shape)
        parts = {str(index): index for index in devices.values() if index is not None}
        for index in parts.values():
            total += _bytes(file.values, _bounds(file.values, index))
            if file.scales is not None:
                total += _bytes(file.scales, _bounds(file.scales, _scale_index(file.values, file.scales, index)))
    return total


def _bounds(span: ArraySpan, index: Index) -> Bounds:
    return tuple(s.indices(n)[:2] for s, n in zip(index, span.shape, strict=True))


def _bytes(span: ArraySpan, bounds: Bounds) -> int:
    return math.prod(b - a for a, b in bounds) * span.dtype.itemsize


def _scale_index(values: ArraySpan, scales: ArraySpan, index: Index) -> Index:
    """Which scales belong to a part of the values."""
    group_rows = values.shape[-2] // scales.shape[-2]
    first, stop, _ = index[-2].indices(values.shape[-2])
    return (*index[:-2], slice(first // group_rows, -(-stop // group_rows)), index[-1])


def parameter_shapes(
    checkpoint: Checkpoint, partition: Partition, *, weights: str = "int8", dtype: jnp.dtype | type = jnp.float32
) -> Params:
    """The shapes, types and places of what `load_parameters` will return, for compiling before anything is loaded."""
    shapes: Params = {}
    for info, file in checkpoint.tensors:
        _put(shapes, info, _shape(info, file, partition, weights, dtype), checkpoint.config, partition)
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
    int4 = weights == "int4"
    groups = partition.int4_groups(info) if int4 else file.scales.shape[-2]
    kept = partition.scale_groups(groups, rows)
    scale_shape = (*file.scales.shape[:-2], kept, file.scales.shape[-1])
    scales = array(scale_shape, jnp.bfloat16 if int4 else file.scales.dtype, partition.scale_axes(kept, info.axes))
    if not partition.kernels.packed:
        values = array(span.shape, jnp.int4 if int4 else span.dtype, info.axes)
        return QuantizedWeight(values, scales)  # type: ignore[arg-type]
    row_ways, column_ways = (partition.ways(partition.axes(axis)) for axis in (rows, columns))
    local = span.shape[-2] // row_ways, span.shape[-1] // column_ways
    blocks, strips, size = packed_shape(*local, max(1, kept // row_ways))
    shape = (*span.shape[:-2], blocks * row_ways, strips * column_ways, size)
    values = array(shape, jnp.int8, (*info.axes, None))
    return PackedWeight(values, scales, span.shape[-2], weights == "int8")  # type: ignore[arg-type]


class _Reader:
    """Reads slices of one tensor file, each once, and counts their bytes."""

    def __init__(self, info: ParameterInfo, file: TensorFile, partition: Partition, progress: LoadProgress) -> None:
        self._file = file
        self._progress = progress
        self._read: dict[tuple[int, Bounds], Array] = {}
        #: Of the values, what this host's devices hold together, if that is better read at once.
        self._together: Bounds | None = None
        found = partition.sharding(info.axes).addressable_devices_indices_map(file.values.shape).values()
        parts = {_bounds(file.values, index) for index in found if index is not None}
        box = tuple((min(a for a, _ in dim), max(b for _, b in dim)) for dim in zip(*parts, strict=True))
        # Parts that lie side by side in short stretches are one longer stretch.
        if len(parts) > 1 and sum(_bytes(file.values, part) for part in parts) == _bytes(file.values, box):
            self._together = box if box[-1] != next(iter(parts))[-1] else None

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
        pack = partition.kernels.pack
        assert pack is not None
        (values,) = self._pack(
            info, partition, [(*info.axes, None)], lambda index: (pack(self._slice(span, index), groups),)
        )
        return PackedWeight(values, placed, span.shape[-2], rounded)

    def packed_table(self, info: ParameterInfo, partition: Partition) -> PackedTable:
        span = self._file.values
        rows, _ = info.axes
        pack = partition.kernels.pack
        assert pack is not None
        axes: list[Axes] = [(None, rows, None), (rows, None)]
        values, scales = self._pack(info, partition, axes, lambda index: pack_table(self._slice(span, index), pack))
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
            source = slice(*source_groups((first, stop), repeats))
            rows = np.arange(first, stop) // repeats - source.start
            return self._slice(scales, (*index[:-2], source, index[-1]))[..., rows, :]

        shape = (*scales.shape[:-2], kept, scales.shape[-1])
        return self._place(shape, partition, partition.scale_axes(kept, info.axes), scale_shard)

    def dequantized(self, info: ParameterInfo, scales: ArraySpan, partition: Partition, dtype: Any) -> jax.Array:
        def shard(index: Index) -> Array:
            return self._products(scales, index).astype(jnp.bfloat16).astype(dtype)

        return self._place(self._file.values.shape, partition, info.axes, shard)

    def int4(self, info: ParameterInfo, scales: ArraySpan, partition: Partition) -> QuantizedWeight:
        values = self._file.values
        groups = partition.int4_groups(info)
        kept = partition.scale_groups(groups, info.axes[-2])
        made: dict[Bounds, tuple[Array, Array]] = {}

        def part(index: Index) -> tuple[Array, Array]:
            bounds = _bounds(values, index)
            if bounds not in made:
                made[bounds] = quantize_int4(self._products(scales, index), values.shape[-2] // groups)
            return made[bounds]

        def scale_part(index: Index) -> Array:
            first, stop, _ = index[-2].indices(kept)
            rows = values.shape[-2] // kept
            return part((*index[:-2], slice(first * rows, stop * rows), index[-1]))[1]

        placed = self._place(values.shape, partition, info.axes, lambda index: part(index)[0])
        shape = (*scales.shape[:-2], kept, scales.shape[-1])
        return QuantizedWeight(placed, self._place(shape, partition, partition.scale_axes(kept, info.axes), scale_part))

    def _products(self, scales: ArraySpan, index: Index) -> Array:
        """The values at `index` as xAI's code has them, in float32: rounded to bfloat16, whatever they are kept in; see
        `workers.kernels.weights.dequantize`."""
        values = self._file.values
        source = _scale_index(values, scales, index)
        first, stop, _ = index[-2].indices(values.shape[-2])
        rows = np.arange(first, stop) // (values.shape[-2] // scales.shape[-2]) - source[-2].start
        factors = self._slice(scales, source)[..., rows, :].astype(np.float32)
        products = self._slice(values, index).astype(np.float32) * factors
        return products.astype(jnp.bfloat16).astype(np.float32)

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
        bounds = _bounds(span, index)
        if span is self._file.values and self._together is not None:
            whole = self._part(span, self._together)
            place = tuple(slice(a - c, b - c) for (a, b), (c, _) in zip(bounds, self._together, strict=True))
            part = np.ascontiguousarray(whole[place])
        else:
            part = self._part(span, bounds)
        name = part_name(self._file.path, span, bounds)
        if name not in self._progress.digests:
            self._progress.digests[name] = digest(part)
        return part

    def _part(self, span: ArraySpan, bounds: Bounds) -> Array:
        key = (span.offset, bounds)
        if key not in self._read:
            self._read[key] = read_slice(self._file.path, span, bounds, self._progress.add)
        return self._read[key]


def quantize_int4(values: Array, group_rows: int) -> tuple[Array, Array]:
    """float32 [..., K, N] -> int4 of the same shape, and bfloat16 scales [..., K / group_rows, N].

    The largest magnitude of a group becomes 7, with the scale as bfloat16 has it.
    """
    *lead, rows, columns = values.shape
    grouped = values.reshape(*lead, rows // group_rows, group_rows, columns)
    scales = (np.abs(grouped).max(axis=-2, keepdims=True) / 7.0).astype(jnp.bfloat16)
    wide = scales.astype(np.float32)
    quantized = np.clip(np.rint(grouped / np.where(wide > 0, wide, 1.0)), -7, 7)
    return quantized.astype(jnp.int4).reshape(values.shape), scales[..., 0, :]
