"""Writes tensor files byte for byte as xAI's release has them: pickle protocol 4 with NumPy 1 module names."""

from __future__ import annotations

import dataclasses
import io
import math
import pathlib
import struct
from typing import Any, BinaryIO

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]

#: CPython's pickler puts a payload of this many bytes outside of its frames.
_FRAME_TARGET = 64 * 1024


@dataclasses.dataclass(frozen=True)
class Hole:
    """An array of zeros that takes no room on a disk with sparse files."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]


def write_array(path: pathlib.Path, values: Array | Hole) -> None:
    """Writes a bare array (embedding, norm or router) of float32, float16, bfloat16 or int8."""
    with path.open("wb") as file:
        pickler = _Pickler(file)
        pickler.array(values)
        pickler.stop()


def write_quantized(path: pathlib.Path, weight: Array | Hole, scales: Array | Hole) -> None:
    """Writes a QuantizedWeight8bit of int8 `weight` [..., K, N] and bfloat16 `scales` [..., G, N]."""
    with path.open("wb") as file:
        pickler = _Pickler(file)
        pickler.named("__main__", "QuantizedWeight8bit")
        pickler.put(b")\x81\x94}\x94(")
        pickler.text("weight")
        pickler.array(weight)
        pickler.text("scales")
        pickler.array(scales)
        pickler.put(b"ub")
        pickler.stop()


class _Pickler:
    """Emits opcodes with the framing and the memo of CPython's pickler. A name met again is fetched from the memo."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._frame = io.BytesIO()
        self._memo: dict[object, int] = {}
        self._memoized = 0
        file.write(b"\x80\x04")

    def put(self, opcodes: bytes) -> None:
        self._frame.write(opcodes)
        self._memoized += opcodes.count(b"\x94")

    def text(self, value: str) -> None:
        if not self._recalled(value):
            encoded = value.encode()
            self._frame.write(b"\x8c" + bytes([len(encoded)]) + encoded)
            self._memoize(value)

    def named(self, module: str, name: str) -> None:
        if not self._recalled((module, name)):
            self.text(module)
            self.text(name)
            self._frame.write(b"\x93")
            self._memoize((module, name))

    def array(self, values: Array | Hole) -> None:
        self.named("numpy.core.multiarray", "_reconstruct")
        self.named("numpy", "ndarray")
        self.put(b"K\x00\x85\x94")
        if not self._recalled(b"b"):
            self._frame.write(b"C\x01b")
            self._memoize(b"b")
        self.put(b"\x87\x94R\x94(K\x01")
        self._shape(values.shape)
        self._dtype(values.dtype)
        self._frame.write(b"\x89")
        if isinstance(values, Hole):
            self._payload(math.prod(values.shape) * values.dtype.itemsize, None)
        else:
            self._payload(values.nbytes, np.ascontiguousarray(values).tobytes())
        self.put(b"t\x94b")

    def stop(self) -> None:
        self._frame.write(b".")
        self._flush()

    def _shape(self, shape: tuple[int, ...]) -> None:
        if len(shape) > 3:
            self._frame.write(b"(")
        for n in shape:
            self._frame.write(
                b"K" + bytes([n])
                if n < 2**8
                else b"M" + struct.pack("<H", n)
                if n < 2**16
                else b"J" + struct.pack("<i", n)
            )
        self.put((b"t", b"\x85", b"\x86", b"\x87")[len(shape) if len(shape) <= 3 else 0] + b"\x94")

    def _dtype(self, dtype: np.dtype[Any]) -> None:
        if self._recalled(dtype):
            return
        self.named("numpy", "dtype")
        if dtype.name == "bfloat16":
            self.named("ml_dtypes", "bfloat16")
            tail = b"K\x02K\x02K\x40"
        else:
            self.text(f"{dtype.kind}{dtype.itemsize}")
            tail = b"J\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00"
        self.put(b"\x89\x88\x87\x94R")
        self._memoize(dtype)
        self._frame.write(b"(K\x03")
        self.text("|" if dtype.itemsize == 1 else "<")
        self._frame.write(b"NNN" + tail)
        self.put(b"t\x94b")

    def _payload(self, size: int, payload: bytes | None) -> None:
        header = (
            b"C" + bytes([size])
            if size < 2**8
            else b"B" + struct.pack("<I", size)
            if size < 2**32
            else b"\x8e" + struct.pack("<Q", size)
        )
        if size < _FRAME_TARGET:
            self._frame.write(header)
            self._frame.write(payload or bytes(size))
        else:
            self._flush()
            self._file.write(header)
            if payload is None:
                self._file.seek(size, io.SEEK_CUR)
            else:
                self._file.write(payload)
        self._memoize(object())

    def _recalled(self, key: object) -> bool:
        if key not in self._memo:
            return False
        self._frame.write(b"h" + bytes([self._memo[key]]))
        return True

    def _memoize(self, key: object) -> None:
        self._frame.write(b"\x94")
        self._memo[key] = self._memoized
        self._memoized += 1

    def _flush(self) -> None:
        opcodes = self._frame.getvalue()
        if len(opcodes) >= 4:
            self._file.write(b"\x95" + struct.pack("<Q", len(opcodes)))
        self._file.write(opcodes)
        self._frame = io.BytesIO()
