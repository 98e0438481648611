"""How parameters lie in the memory of devices: shapes, loading and planned bytes all follow from this."""

from __future__ import annotations

import dataclasses
from typing import Literal

from workers.kernels.int4 import INT4_ROWS, packed_int4_shape
from workers.kernels.packing import packed_shape
from workers.model.layout import Layout
from workers.model.parameters import EMBEDDING, SCALE_GROUPS, Axes, ParameterInfo

#: Of `workers.messages.specs.WEIGHTS`, those whose values are multiplied by their scales while they load.
WIDE = ("bfloat16", "float32")


@dataclasses.dataclass(frozen=True)
class Source:
    """How a checkpoint stores a parameter: the type of its values, and how many groups of rows have scales; 0 for no scales."""

    dtype: str
    groups: int = 0
    scale_dtype: str = "bfloat16"


@dataclasses.dataclass(frozen=True)
class StoredArray:
    """An array that lies on the devices of a mesh: its whole shape, its type, and the logical axes of its first dimensions."""

    shape: tuple[int, ...]
    dtype: str
    axes: Axes


@dataclasses.dataclass(frozen=True)
class StoredWeight:
    """What the devices keep of a parameter.

    Attributes:
      form: `array`: as the checkpoint has it, or cast; `products`: values times scales; `quantized`: both; `int4`: quantized
        again; `paired`: two of these a byte; `packed`, `packed_int4` and `packed_table`: as native kernels read it.
      arrays: values, and scales where the form has them.
    """

    form: Literal["array", "products", "quantized", "int4", "paired", "packed", "packed_int4", "packed_table"]
    arrays: tuple[StoredArray, ...]


@dataclasses.dataclass(frozen=True)
class WeightFormat:
    """The form in which a model's parameters are kept.

    Attributes:
      weights: one of `workers.messages.specs.WEIGHTS`; unrounded ones are for native kernels only.
      activations: the type of activations, and of the embedding table.
      packed: whether native kernels read weights and table.
      paired: whether kernels read 4-bit values two a byte.
    """

    weights: str
    activations: str
    packed: bool
    paired: bool = False

    def stored(self, info: ParameterInfo, source: Source, layout: Layout) -> StoredWeight:
        """What devices keep of a parameter on a mesh of this layout."""
        if info.path == EMBEDDING:
            return self._table(info, layout)
        if not source.groups:
            dtype = self.weights if info.quantized and self.weights in WIDE else source.dtype
            return StoredWeight("array", (StoredArray(info.shape, dtype, info.axes),))
        if self.weights in WIDE and not self.packed:
            return StoredWeight("products", (StoredArray(info.shape, self.weights, info.axes),))
        int4 = self.weights == "int4"
        if int4 and self.packed:
            return self._packed_int4(info, layout)
        kept = layout.int4_groups(info) if int4 else layout.scale_groups(source.groups, info.axes[-2])
        scale_dtype = "bfloat16" if int4 else source.scale_dtype
        *lead, rows, columns = info.shape
        scales = StoredArray((*lead, kept, columns), scale_dtype, layout.scale_axes(kept, info.axes))
        if int4 and self.paired:
            return StoredWeight("paired", (StoredArray((*lead, rows // 2, columns), "int8", info.axes), scales))
        if not self.packed:
            values = StoredArray(info.shape, "int4" if int4 else source.dtype, info.axes)
            return StoredWeight("int4" if int4 else "quantized", (values, scales))
        row_ways, column_ways = _ways(info, layout)
        shape = packed_shape(rows // row_ways, columns // column_ways, max(1, kept // row_ways))
        return StoredWeight("packed", (_packed(info, layout, shape), scales))

    def _packed_int4(self, info: ParameterInfo, layout: Layout) -> StoredWeight:
        *lead, rows, columns = info.shape
        row_ways, column_ways = _ways(info, layout)
        runs = -(-rows // row_ways // INT4_ROWS)
        values = _packed(info, layout, packed_int4_shape(rows // row_ways, columns // column_ways))
        kept = runs * row_ways
        scales = StoredArray((*lead, kept, columns), "bfloat16", layout.scale_axes(kept, info.axes))
        return StoredWeight("packed_int4", (values, scales))

    def _table(self, info: ParameterInfo, layout: Layout) -> StoredWeight:
        if not self.packed:
            return StoredWeight("array", (StoredArray(info.shape, self.activations, info.axes),))
        vocab, width = info.shape
        ways = layout.ways(layout.axes(info.axes[0]))
        blocks, strips, size = packed_shape(width, vocab // ways, 1, planes=2)
        values = StoredArray((blocks, strips * ways, size), "int8", (None, info.axes[0], None))
        return StoredWeight("packed_table", (values, StoredArray((vocab, 1), "float32", (info.axes[0], None))))


def _ways(info: ParameterInfo, layout: Layout) -> tuple[int, int]:
    """The numbers of parts that rows and columns are split into."""
    rows, columns = (layout.ways(layout.axes(axis)) for axis in info.axes[-2:])
    return rows, columns


def _packed(info: ParameterInfo, layout: Layout, part: tuple[int, int, int]) -> StoredArray:
    """The values of a packed weight, of which a device has `part`: blocks, strips and bytes of a strip."""
    row_ways, column_ways = _ways(info, layout)
    shape = (*info.shape[:-2], part[0] * row_ways, part[1] * column_ways, part[2])
    return StoredArray(shape, "int8", (*info.axes, None))


#: Bytes of a value on a device.
ITEM_BYTES = {"float32": 4.0, "bfloat16": 2.0, "float16": 2.0, "int8": 1.0, "int4": 0.5}


def release_source(info: ParameterInfo) -> Source:
    """How xAI's release stores a parameter."""
    if not info.quantized:
        return Source("float32")
    return Source("int8", SCALE_GROUPS if info.grouped else 1)
