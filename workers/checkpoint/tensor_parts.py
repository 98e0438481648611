"""What one device keeps of a tensor, made from the bytes of its own slice of the file."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import jax.numpy as jnp
import numpy as np

from workers.checkpoint.digests import digest, part_name, source_groups
from workers.checkpoint.reading import Bounds, Scratch, read_slice
from workers.checkpoint.tensor_file import ArraySpan, TensorFile
from workers.kernels.int4 import pair, quantize_int4
from workers.kernels.interface import Packing
from workers.kernels.packing import Array
from workers.model.weight_format import StoredWeight


class TensorParts:
    """Reads slices of one tensor file, each once, and makes of them what devices keep."""

    def __init__(
        self,
        file: TensorFile,
        stored: StoredWeight,
        parts: list[Bounds],
        packing: Packing | None,
        count: Callable[[int], None],
        digests: dict[str, int],
        scratch: Scratch | None = None,
    ) -> None:
        """Nothing is read yet.

        Args:
          file: the tensor.
          stored: what is made of it.
          parts: which slices of its values the devices of this host hold.
          packing: the kernels' own, where they have one.
          count: called with the number of bytes read, as they come.
          digests: that of each slice is added; see `digests`.
          scratch: where to read to, if not to memory of its own.
        """
        self.parts = parts
        self._file = file
        self._stored = stored
        self._packing = packing
        self._count = count
        self._digests = digests
        self._scratch = scratch
        self._read: dict[tuple[int, Bounds], Array] = {}
        #: Of the values, what this host's devices hold together, if that is better read at once.
        self._together: Bounds | None = None
        box = tuple((min(a for a, _ in dim), max(b for _, b in dim)) for dim in zip(*parts, strict=True))
        # Parts that lie side by side in short stretches are one longer stretch.
        if len(parts) > 1 and sum(map(_size, parts)) == _size(box):
            self._together = box if box[-1] != parts[0][-1] else None

    def make(self, bounds: Bounds, out: Sequence[Array]) -> None:
        """Fills the values, and scales if there are any, of the device that holds the slice `bounds` of the values."""
        values, form = self._file.values, self._stored.form
        if form == "array":
            out[0][...] = self._slice(values, bounds)
        elif form == "products":
            out[0][...] = self._products(bounds)
        elif form == "packed_table":
            assert self._packing is not None
            self._packing.table(self._slice(values, bounds), out[0], out[1])
        elif form == "packed_int4":
            assert self._packing is not None
            self._packing.int4(self._slice(values, bounds), *self._factors(bounds), *out)
        elif form in ("int4", "paired"):
            group_rows = values.shape[-2] // self._stored.arrays[1].shape[-2]
            quantized, out[1][...] = quantize_int4(self._products(bounds), group_rows)
            out[0][...] = pair(quantized, group_rows) if form == "paired" else quantized
        else:
            out[1][...] = scales = self._kept_scales(bounds, self._stored.arrays[1].shape[-2])
            if form == "packed":
                assert self._packing is not None
                self._packing.weight(self._slice(values, bounds), scales.shape[-2], out[0])
            else:
                out[0][...] = self._slice(values, bounds)

    @property
    def nbytes(self) -> int:
        """Bytes of the file that all parts take together."""
        values, scales = self._file.values, self._file.scales
        total = sum(map(_size, self.parts)) * values.dtype.itemsize
        if scales is not None:
            total += sum(_size(self._scale_bounds(scales, part)) for part in self.parts) * scales.dtype.itemsize
        return total

    def _scale_bounds(self, scales: ArraySpan, bounds: Bounds) -> Bounds:
        """Which scales in the file belong to a slice of the values."""
        group_rows = self._file.values.shape[-2] // scales.shape[-2]
        first, stop = bounds[-2]
        return (*bounds[:-2], (first // group_rows, -(-stop // group_rows)), bounds[-1])

    def _kept_scales(self, bounds: Bounds, kept: int) -> Array:
        """The scales of a slice of the values, of which there are `kept` groups: each of the file's, or each several times."""
        scales = self._file.scales
        assert scales is not None
        rows, repeats = self._file.values.shape[-2], kept // scales.shape[-2]
        first, stop = (0, 1) if kept == 1 else (bounds[-2][0] * kept // rows, bounds[-2][1] * kept // rows)
        source = source_groups((first, stop), repeats)
        taken = np.arange(first, stop) // repeats - source[0]
        return self._slice(scales, (*bounds[:-2], source, bounds[-1]))[..., taken, :]

    def _products(self, bounds: Bounds) -> Array:
        """Values times scales as xAI's code has them, in float32: rounded to bfloat16, whatever they are kept in; see
        `workers.kernels.weights.dequantize`."""
        factors, groups = self._factors(bounds)
        products = self._slice(self._file.values, bounds).astype(np.float32) * factors[..., groups, :].astype(
            np.float32
        )
        return products.astype(jnp.bfloat16).astype(np.float32)

    def _factors(self, bounds: Bounds) -> tuple[Array, Array]:
        """The file's scales [..., G, N] for a slice of the values, and which of the G belongs to each of its rows [K]."""
        scales = self._file.scales
        assert scales is not None
        source = self._scale_bounds(scales, bounds)
        groups = np.arange(*bounds[-2]) // (self._file.values.shape[-2] // scales.shape[-2]) - source[-2][0]
        return self._slice(scales, source), groups

    def _slice(self, span: ArraySpan, bounds: Bounds) -> Array:
        """The slice `bounds` of an array in the file."""
        if span is self._file.values and self._together is not None:
            whole = self._part(span, self._together)
            place = tuple(slice(a - c, b - c) for (a, b), (c, _) in zip(bounds, self._together, strict=True))
            part = np.ascontiguousarray(whole[place])
        else:
            part = self._part(span, bounds)
        name = part_name(self._file.path, span, bounds)
        if name not in self._digests:
            self._digests[name] = digest(part)
        return part

    def _part(self, span: ArraySpan, bounds: Bounds) -> Array:
        key = (span.offset, bounds)
        if key not in self._read:
            self._read[key] = read_slice(self._file.path, span, bounds, self._count, self._scratch)
        return self._read[key]


def _size(bounds: Bounds) -> int:
    return math.prod(stop - start for start, stop in bounds)
