"""The C++ kernels (src/) as `Kernels`. They take float32 activations and packed 8-bit weights."""

from __future__ import annotations

import ctypes
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from workers.kernels.cpu.bindings import library
from workers.kernels.cpu.collectives import COLLECTIVES
from workers.kernels.int4 import INT4_ROWS, packed_int4_shape
from workers.kernels.interface import Arrays, Kernels, Packing
from workers.kernels.packed import PackedTable, PackedWeight, rows_of
from workers.kernels.packing import Array, packed_shape
from workers.kernels.sampling import PACKED_WIDTH, SamplingRows, SamplingState, uniforms
from workers.kernels.weights import Weight, layered, taken

#: From the one that any machine has to the fastest.
INSTRUCTION_SETS = ("portable", "avx2", "avx512", "avx512-vnni")


def native_kernels() -> Kernels:
    """The kernels for this machine's instruction set, for as many devices as JAX is to have. Raises NativeKernelsError."""
    devices: int = jax.config.jax_num_cpu_devices  # type: ignore[attr-defined]
    library().grokmesh_share(ctypes.c_int64(max(devices, 1)))
    name = library().grokmesh_instruction_set().decode()
    return Kernels(
        name=name,
        norm=_norm,
        route=_route,
        project=_project,
        experts=_experts,
        lookup=_lookup,
        logits=_logits,
        attend=_attend,
        sample=_sample,
        score=_score,
        batch_invariant=True,
        collectives=COLLECTIVES,
        packing=Packing(_pack, _pack_int4, _pack_table),
    )


def use_instruction_set(name: str) -> bool:
    """Computes with one of INSTRUCTION_SETS from now on; False if this machine can't."""
    return bool(library().grokmesh_use(name.encode()))


def _pack(weight: Array, groups: int, values: Array) -> None:
    *lead, rows, columns = weight.shape
    shape = packed_shape(rows, columns, groups)
    _check(values, (*lead, *shape), np.int8)
    sizes = (math.prod(lead), rows, columns, groups, *shape)
    library().grokmesh_pack(*_pointers(np.ascontiguousarray(weight), values), *map(ctypes.c_int64, sizes))


def _pack_int4(weight: Array, factors: Array, groups: Array, values: Array, scales: Array) -> None:
    *lead, rows, columns = weight.shape
    runs = -(-rows // INT4_ROWS)
    shape = packed_int4_shape(rows, columns)
    _check(values, (*lead, *shape), np.int8)
    _check(scales, (*lead, runs, columns), jnp.bfloat16)
    given = np.ascontiguousarray(weight), np.ascontiguousarray(factors), np.ascontiguousarray(groups, np.int64)
    sizes = (math.prod(lead), rows, columns, factors.shape[-2], *shape)
    library().grokmesh_pack_int4(*_pointers(*given, values, scales), *map(ctypes.c_int64, sizes))


def _pack_table(table: Array, values: Array, scales: Array) -> None:
    rows, width = table.shape
    blocks, strips, size = packed_shape(width, rows, 1)
    _check(values, (blocks, strips, 2 * size), np.int8)
    _check(scales, (rows, 1), np.float32)
    bfloat16 = table.dtype == jnp.bfloat16
    whole = np.ascontiguousarray(table, None if bfloat16 else np.float32)
    pointers = _pointers(whole, values, scales)
    sizes = map(ctypes.c_int64, (rows, width, blocks, strips, size))
    library().grokmesh_pack_table(*pointers, ctypes.c_bool(bfloat16), *sizes)


def _check(array: Array, shape: tuple[int, ...], dtype: Any) -> None:
    """What the library writes to must be of the size that it takes for granted."""
    if array.shape != shape or array.dtype != dtype or not array.flags.c_contiguous:
        raise ValueError(f"an array {array.shape} of {array.dtype}; must be {shape} of {np.dtype(dtype)}, contiguous")


def _pointers(*arrays: Array) -> list[ctypes.c_void_p]:
    return [ctypes.c_void_p(array.ctypes.data) for array in arrays]


def _float32(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def _norm(
    x: jax.Array, valid: jax.Array, scale: Weight, residual: jax.Array | None = None, *, epsilon: float
) -> jax.Array:
    more = () if residual is None else (residual,)
    call = jax.ffi.ffi_call("grokmesh_norm", _float32(*x.shape))
    normed: jax.Array = call(x, valid, taken(scale), *more, epsilon=np.float32(epsilon))
    return normed


def _route(x: jax.Array, valid: jax.Array, weight: Weight, selected: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    rows = x.shape[0]
    results = (
        _float32(rows, weight.shape[1]),
        _float32(rows, selected),
        jax.ShapeDtypeStruct((rows, selected), jnp.int32),
    )
    probabilities, gates, experts = jax.ffi.ffi_call("grokmesh_route", results)(x, valid, taken(weight))
    return gates, experts, probabilities


def _project(x: jax.Array, valid: jax.Array, weights: tuple[Weight, ...]) -> Arrays:
    """Weights with as many groups of rows share a call, and x is prepared once for all of them."""
    packed, layer = _stacked(weights)
    results: dict[int, jax.Array] = {}
    for groups in {w.scales.shape[-2] for w in packed}:
        chosen = [i for i, w in enumerate(packed) if w.scales.shape[-2] == groups]
        shapes = tuple(_float32(x.shape[0], packed[i].scales.shape[-1]) for i in chosen)
        flat = [array for i in chosen for array in (packed[i].values, packed[i].scales)]
        call = jax.ffi.ffi_call("grokmesh_dense", shapes)
        results.update(zip(chosen, call(x, valid, layer, *flat, form=packed[0].form), strict=True))
    return tuple(results[i] for i in range(len(packed)))


def _experts(
    x: jax.Array,
    gates: jax.Array,
    experts: jax.Array,
    valid: jax.Array,
    gate: Weight,
    up: Weight,
    down: Weight,
    reduce: None,
) -> jax.Array:
    if reduce is not None:
        raise ValueError("packed weights can't be split along the embedding")
    packed, layer = _stacked((gate, up, down))
    flat = [array for weight in packed for array in (weight.values, weight.scales)]
    call = jax.ffi.ffi_call("grokmesh_experts", _float32(*x.shape))
    mixed: jax.Array = call(x, gates, experts, valid, layer, *flat, form=packed[0].form)
    return mixed


def _stacked(weights: tuple[Weight, ...]) -> tuple[list[PackedWeight], jax.Array]:
    """Weights of all layers, and the layer whose ones they are."""
    layer = jnp.zeros((), jnp.int32)
    packed = []
    for own in map(layered, weights):
        if not isinstance(own.stacked, PackedWeight):
            raise TypeError("the native kernels take packed weights")
        packed.append(own.stacked)
        layer = own.layer
    return packed, layer


def _lookup(table: PackedTable, tokens: jax.Array) -> jax.Array:
    return rows_of(table, jnp.clip(tokens, 0, table.shape[0] - 1))


def _logits(hidden: jax.Array, valid: jax.Array, table: PackedTable) -> jax.Array:
    call = jax.ffi.ffi_call("grokmesh_logits", _float32(hidden.shape[0], table.shape[0]))
    result: jax.Array = call(hidden, valid, table.values, table.scales)
    return result


def _attend(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    key_pages: jax.Array,
    value_pages: jax.Array,
    table: jax.Array,
    positions: jax.Array,
    *,
    scale: float,
    cap: float,
    rope_base: float,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    results = (
        _float32(*query.shape),
        jax.ShapeDtypeStruct(key_pages.shape, key_pages.dtype),
        jax.ShapeDtypeStruct(value_pages.shape, value_pages.dtype),
    )
    call = jax.ffi.ffi_call("grokmesh_attend", results, input_output_aliases={3: 1, 4: 2})
    arrays = (query, key, value, key_pages, value_pages, table, positions)
    mixed, key_pages, value_pages = call(
        *arrays, scale=np.float32(scale), cap=np.float32(cap), rope_base=np.float32(rope_base)
    )
    return mixed, key_pages, value_pages


def _sample(logits: jax.Array, state: SamplingState, rows: SamplingRows) -> jax.Array:
    penalties = (rows.repetition, rows.presence, rows.frequency)
    floats = jnp.stack([rows.temperature, rows.top_p, rows.min_p, *penalties, uniforms(rows)], axis=-1)
    ints = jnp.stack([rows.slot, rows.active.astype(jnp.int32), rows.flags, rows.top_k], axis=-1)
    call = jax.ffi.ffi_call("grokmesh_sample", jax.ShapeDtypeStruct((logits.shape[0], PACKED_WIDTH), jnp.int32))
    packed: jax.Array = call(logits, floats, ints, state.bias, state.counts, state.mask)
    return packed


def _score(logits: jax.Array, tokens: jax.Array) -> jax.Array:
    call = jax.ffi.ffi_call("grokmesh_score", jax.ShapeDtypeStruct((logits.shape[0], PACKED_WIDTH), jnp.int32))
    packed: jax.Array = call(logits, tokens)
    return packed
