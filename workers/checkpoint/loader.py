"""Streams a checkpoint to the devices of a mesh, each host reading only the bytes of its own shards."""

from __future__ import annotations

import collections
import concurrent.futures
import functools
import logging
import math
import os
import pathlib
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from workers.checkpoint.checkpoint import Checkpoint
from workers.checkpoint.errors import CheckpointError
from workers.checkpoint.reading import Bounds, Scratch
from workers.checkpoint.tensor_file import TensorFile
from workers.checkpoint.tensor_parts import TensorParts
from workers.checkpoint.twin import Twin, find_twin
from workers.checkpoint.weights_cache import CacheError, WeightsCache, model_key
from workers.kernels.packed import Form, PackedTable, PackedWeight
from workers.kernels.packing import Array, empty
from workers.kernels.weights import PairedWeight, QuantizedWeight, Table, Weight
from workers.messages.specs import WeightsAddress
from workers.model.parameters import ParameterInfo
from workers.model.partition import Partition
from workers.model.weight_format import Source, StoredWeight, WeightFormat

_LOG = logging.getLogger(__name__)

#: Haiku's nested dictionary; parameters of layers lie stacked, [L, ...].
Params = dict[str, dict[str, Weight | Table]]

#: Tensors that are loaded at a time: while one is read, another is packed.
THREADS = 4
#: Seconds between reports while bytes come.
REPORT_SECONDS = 1.0
#: Tensors that are loaded, or wait to be.
AHEAD = 6


class LoadProgress:
    """Counts what this host reads. Bytes of payload, each counted once however many devices hold it."""

    def __init__(self, report: Callable[[LoadProgress], None]) -> None:
        """`report` is called about once a second while bytes come."""
        self._report = report
        self._reported = time.monotonic()
        #: Bytes that this host reads in all.
        self.total = 0
        self.read = 0
        #: Bytes that lay in the weights cache, and that came from another host's.
        self.mapped = self.taken = 0
        self.tensors = 0
        #: Of each part of an array that a device holds, by its name; see `digests`.
        self.digests: dict[str, int] = {}
        self._lock = threading.Lock()

    def add(self, count: int = 0, tensors: int = 0, taken: int = 0) -> None:
        """Notes what was read, or taken from another host."""
        with self._lock:
            self.read += count
            self.taken += taken
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
    cache: pathlib.Path | None = None,
    twins: Sequence[WeightsAddress] = (),
) -> tuple[Params, LoadProgress]:
    """Loads all parameters onto the partition's mesh. No host waits for another.

    THREADS tensors at a time are read, of each only this host's slices, and turned into what the devices keep. The parts of
    a parameter gather in this host's memory until they are those of all layers, and then go to their devices: on CPU hosts
    they are there already.

    Args:
      checkpoint: what to load.
      partition: with a mesh.
      weights: see `WeightFormat`.
      dtype: of the activations, and of the embedding table, which is cast to it. Native kernels pack weights and table
        as they need them, whatever this and `weights` are.
      report: called after each tensor, and about once a second, by any thread.
      cache: directory of this host's weights cache; see `weights_cache`.
      twins: weights caches of other hosts, which may have what this one lacks; see `twin`.

    Returns:
      The parameters, and the final counts.

    Raises:
      CheckpointError: a file can't be read, or layers are stored in different forms.
    """
    weight_format = WeightFormat(weights, jnp.dtype(dtype).name, partition.kernels.packed, partition.kernels.paired)
    places = list(_places(checkpoint, partition, weight_format))
    progress = LoadProgress(report)
    kept = _open_cache(cache, checkpoint, partition, weight_format, places) if cache else None
    if kept is not None and kept.complete:
        try:
            return _map(places, kept, progress), progress
        except CacheError as error:
            _LOG.warning("weights cache: %s; the checkpoint is read", error)
            kept.discard()
            places, progress = list(_places(checkpoint, partition, weight_format)), LoadProgress(report)
    progress.total = sum(place.reader(file, progress).nbytes for place in places for _, file in place.tensors)
    if kept is not None and twins:
        largest = max((file for _, file in checkpoint.tensors), key=lambda file: math.prod(file.values.shape))
        twin = find_twin(twins, kept.name, largest.path)
        for place in places:
            place.twin = twin
        progress.digests.update(twin.digests if twin else {})
    params = _read(places, kept, progress)
    return params, progress


def _open_cache(
    directory: pathlib.Path,
    checkpoint: Checkpoint,
    partition: Partition,
    weight_format: WeightFormat,
    places: list[_Place],
) -> WeightsCache | None:
    """This host's weights cache; None, with a warning, if it can't be used."""
    form = (weight_format, dict(partition.sizes), dict(partition.rules))
    try:
        return WeightsCache(directory, model_key(checkpoint, form), [place.parts for place in places])
    except OSError as error:
        _LOG.warning("no weights cache: %s", error)
        return None


def _map(places: list[_Place], cache: WeightsCache, progress: LoadProgress) -> Params:
    """All parameters from the cache. Raises CacheError."""
    params: Params = {}
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        for place in places:
            list(pool.map(lambda check: check(), place.map(cache)))
            progress.mapped += place.nbytes
            place.put(params)
            progress.add(tensors=len(place.tensors))
    progress.digests.update(cache.digests)
    return params


def _read(places: list[_Place], cache: WeightsCache | None, progress: LoadProgress) -> Params:
    """All parameters from the checkpoint, and into the cache if there is room. Raises CheckpointError."""
    params: Params = {}
    for place in places:
        place.cache = cache
    spare: queue.SimpleQueue[Scratch] = queue.SimpleQueue()
    for _ in range(THREADS):
        spare.put(Scratch())
    with concurrent.futures.ThreadPoolExecutor(THREADS, "load") as pool:
        # No more at a time: what is being loaded lies beside what has been.
        running: collections.deque[tuple[_Place, concurrent.futures.Future[None]]] = collections.deque()

        def finish() -> None:
            place, loaded = running.popleft()
            loaded.result()
            progress.add(tensors=1)
            place.missing -= 1
            if not place.missing:
                place.put(params)

        try:
            for place in places:
                for layer, (_, file) in enumerate(place.tensors):
                    if len(running) == AHEAD:
                        finish()
                    running.append((place, pool.submit(place.load, layer, file, progress, spare)))
            while running:
                finish()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            if cache is not None:
                cache.abandon()
            raise
    if cache is not None:
        _keep(cache, places, progress)
    return params


def _keep(cache: WeightsCache, places: list[_Place], progress: LoadProgress) -> None:
    """Keeps what was loaded for the next load, if all of it lies in the cache."""
    try:
        if all(place.cache for place in places):
            cache.keep(progress.digests)
    except OSError as error:
        _LOG.warning("no weights cache: %s", error)
    cache.abandon()


def parameter_shapes(
    checkpoint: Checkpoint, partition: Partition, *, weights: str = "int8", dtype: jnp.dtype | type = jnp.float32
) -> Params:
    """The shapes, types and places of what `load_parameters` will return, for compiling before anything is loaded."""
    shapes: Params = {}
    weight_format = WeightFormat(weights, jnp.dtype(dtype).name, partition.kernels.packed, partition.kernels.paired)
    for place in _places(checkpoint, partition, weight_format):
        module, name = place.tensors[0][0].place
        shapes.setdefault(module, {})[name] = place.tree(
            [
                jax.ShapeDtypeStruct(shape, jnp.dtype(array.dtype), sharding=sharding)
                for array, shape, sharding in zip(place.stored.arrays, place.shapes, place.shardings, strict=True)
            ]
        )
    return shapes


def _places(checkpoint: Checkpoint, partition: Partition, weight_format: WeightFormat) -> Iterator[_Place]:
    """The parameters of the model's tree, each with the tensors that are its layers, in their order."""
    tensors: dict[tuple[str, str], list[tuple[ParameterInfo, TensorFile]]] = {}
    for info, file in checkpoint.tensors:
        tensors.setdefault(info.place, []).append((info, file))
    for group in tensors.values():
        group.sort(key=lambda tensor: tensor[0].layer or 0)
        sources = [_source(file) for _, file in group]
        for (info, file), source in zip(group, sources, strict=True):
            if source != sources[0]:
                problem = f"is stored as {source}, the first layer's as {sources[0]}; all layers must be alike"
                raise CheckpointError(file.path, problem, tensor=info.path)
        stored = weight_format.stored(group[0][0], sources[0], partition)
        packed: dict[str, Form] = {"int4": "int4", "int8-unrounded": "unrounded"}
        yield _Place(group, stored, partition, packed.get(weight_format.weights, "rounded"))


def _source(file: TensorFile) -> Source:
    if file.scales is None:
        return Source(file.values.dtype.name)
    return Source(file.values.dtype.name, file.scales.shape[-2], file.scales.dtype.name)


class _Place:
    """A parameter of the model's tree: one tensor, or those of all layers."""

    def __init__(
        self, tensors: list[tuple[ParameterInfo, TensorFile]], stored: StoredWeight, partition: Partition, packed: Form
    ) -> None:
        info = tensors[0][0]
        lead = () if info.layer is None else (len(tensors),)
        self.tensors = tensors
        self.stored = stored
        self.missing = len(tensors)
        #: Where the arrays lie while they are filled, if not in this process's memory alone.
        self.cache: WeightsCache | None = None
        #: Another host that has them.
        self.twin: Twin | None = None
        self.shapes = [(*lead, *array.shape) for array in stored.arrays]
        self.shardings = [partition.sharding((*(None for _ in lead), *array.axes)) for array in stored.arrays]
        self._info = info
        self._partition = partition
        self._packed = packed
        self._lock = threading.Lock()
        #: What a device holds of each array, with its layers.
        self._local = [
            ((len(tensors), *partition.local(array.shape, array.axes)), jnp.dtype(array.dtype))
            for array in stored.arrays
        ]
        #: Of each slice of the values that a device of this host holds, what is kept of it.
        self._buffers: dict[Bounds, list[Array]] = {}

    @functools.cached_property
    def _devices(self) -> dict[jax.Device, Bounds]:
        """Which slice of the values each device of this host holds."""
        shape, sharding = self._info.shape, self._partition.sharding(self._info.axes)
        found = sharding.addressable_devices_indices_map(shape)
        return {
            device: tuple(s.indices(n)[:2] for s, n in zip(index or (), shape, strict=True))
            for device, index in found.items()
        }

    @functools.cached_property
    def parts(self) -> list[Bounds]:
        """The slices of the values that devices of this host hold."""
        return list(dict.fromkeys(self._devices.values()))

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays that this host holds."""
        return sum(buffer.nbytes for buffers in self._buffers.values() for buffer in buffers)

    def reader(self, file: TensorFile, progress: LoadProgress, scratch: Scratch | None = None) -> TensorParts:
        """Of one of the tensors."""
        return TensorParts(
            file, self.stored, self.parts, self._partition.kernels.packing, progress.add, progress.digests, scratch
        )

    def load(self, layer: int, file: TensorFile, progress: LoadProgress, spare: queue.SimpleQueue[Scratch]) -> None:
        """Puts what is kept of a tensor among the layers: as a twin has it, else of what is read. Raises CheckpointError."""
        if self.twin is not None and self.twin.usable:
            try:
                self._take(self.twin, layer, progress)
                return
            except (OSError, CacheError) as error:
                _LOG.warning("%s is read from the checkpoint: %s", self._info.path, error)
        scratch = spare.get()
        reader = self.reader(file, progress, scratch)
        try:
            for bounds in reader.parts:
                room = self._room(bounds)
                reader.make(bounds, [buffer[layer] for buffer in room])
                for i in range(len(room)):
                    self._loaded(bounds, i, layer)
        except OSError as error:
            raise CheckpointError(file.path, f"can't be read: {error}", tensor=self._info.path) from error
        finally:
            scratch.clear()
            spare.put(scratch)

    def _take(self, twin: Twin, layer: int, progress: LoadProgress) -> None:
        """Raises OSError, CacheError."""
        for bounds in self.parts:
            for i, buffer in enumerate(self._room(bounds)):
                twin.take(self._name(bounds, i), layer, buffer[layer])
                self._loaded(bounds, i, layer)
                progress.add(taken=buffer[layer].nbytes)

    def _loaded(self, bounds: Bounds, array: int, layer: int) -> None:
        if self.cache is not None:
            self.cache.filled(self._name(bounds, array), layer, self._buffers[bounds][array][layer])

    def map(self, cache: WeightsCache) -> Iterator[Callable[[], None]]:
        """Takes all arrays from the cache; gives checks of their layers, which raise CacheError. Raises CacheError."""
        for bounds in self.parts:
            names = [self._name(bounds, i) for i in range(len(self._local))]
            self._buffers[bounds] = [cache.mapped(name, *local) for name, local in zip(names, self._local, strict=True)]
            for name, array in zip(names, self._buffers[bounds], strict=True):
                yield from (functools.partial(cache.check, name, i, layer) for i, layer in enumerate(array))

    def _name(self, bounds: Bounds, array: int) -> str:
        """Of an array's file."""
        module, name = self._info.place
        return f"{module.replace('/', '.')}.{name}.{array}.{self.parts.index(bounds)}"

    def _room(self, bounds: Bounds) -> list[Array]:
        with self._lock:
            if bounds not in self._buffers:
                self._buffers[bounds] = [self._empty(bounds, i) for i in range(len(self._local))]
            return self._buffers[bounds]

    def _empty(self, bounds: Bounds, array: int) -> Array:
        shape, dtype = self._local[array]
        if self.cache is not None:
            try:
                return self.cache.room(self._name(bounds, array), shape, dtype)
            except OSError as error:
                _LOG.warning("no weights cache: %s", error)
                self.cache = None
        return empty(shape, dtype)

    def put(self, params: Params) -> None:
        """Adds the parameter, with all of its layers, to the model's tree."""
        module, name = self._info.place
        params.setdefault(module, {})[name] = self._placed()

    def _placed(self) -> Weight | Table:
        arrays = []
        for i, (shape, sharding) in enumerate(zip(self.shapes, self.shardings, strict=True)):
            pieces = []
            for device, bounds in self._devices.items():
                piece = self._buffers[bounds][i]
                pieces.append(jax.device_put(piece if self._info.layer is not None else piece[0], device))
            arrays.append(jax.make_array_from_single_device_arrays(shape, sharding, pieces))
        jax.block_until_ready(arrays)
        self._buffers.clear()
        return self.tree(arrays)

    def tree(self, arrays: list[Any]) -> Weight | Table:
        """Arrays of the stored form, or their shapes, as the parameter that kernels take."""
        form, shape = self.stored.form, self._info.shape
        if form in ("array", "products"):
            array: jax.Array = arrays[0]
            return array
        values, scales = arrays
        if form in ("packed", "packed_int4"):
            return PackedWeight(values, scales, shape[-2], self._packed)
        if form == "packed_table":
            return PackedTable(values, scales, shape[-1])
        return PairedWeight(values, scales) if form == "paired" else QuantizedWeight(values, scales)
