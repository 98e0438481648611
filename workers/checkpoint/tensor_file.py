"""One tensor file of `ckpt-0`: a pickle of which only the header is interpreted, symbolically, and nothing is executed.

The file is walked opcode by opcode. Names of classes and functions stay strings; the few that a tensor file contains are
given the meaning they have there, and all others are refused. The bytes of an array are skipped.
"""

from __future__ import annotations

import dataclasses
import math
import struct
from collections.abc import Callable
from typing import Any, NoReturn

import ml_dtypes
import numpy as np

from workers.checkpoint.errors import CheckpointError
from workers.checkpoint.storage import Location, ObjectPath, Window

_RECONSTRUCT = frozenset({("numpy.core.multiarray", "_reconstruct"), ("numpy._core.multiarray", "_reconstruct")})
_NDARRAY = ("numpy", "ndarray")
_DTYPE = ("numpy", "dtype")
_BFLOAT16 = ("ml_dtypes", "bfloat16")
_QUANTIZED = frozenset({("__main__", "QuantizedWeight8bit"), ("model", "QuantizedWeight8bit")})
_DTYPES = {
    "i1": np.dtype(np.int8),
    "f4": np.dtype(np.float32),
    "f2": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}

#: A real header takes about 80 opcodes and 400 bytes; what goes far beyond that is no tensor file.
_MAX_OPCODES = 1_000
_MAX_STRING = 1_000


@dataclasses.dataclass(frozen=True)
class ArraySpan:
    """Where an array lies in a file, and what it is: C order from byte `offset` on."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    offset: int

    @property
    def nbytes(self) -> int:
        """Size of the payload in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclasses.dataclass(frozen=True)
class TensorFile:
    """A tensor file's header: a bare array (`scales` is None), or int8 values with their scales."""

    path: Location
    values: ArraySpan
    scales: ArraySpan | None

    def map(self, span: ArraySpan) -> np.ndarray[Any, np.dtype[Any]]:
        """The whole array `span` of this file; on a disk mapped read-only: bytes are read when they are touched."""
        if isinstance(self.path, ObjectPath):
            return np.frombuffer(self.path.read(span.offset, span.nbytes), span.dtype).reshape(span.shape)
        return np.memmap(self.path, dtype=span.dtype, mode="r", offset=span.offset, shape=span.shape)


@dataclasses.dataclass
class _Global:
    name: tuple[str, str]


@dataclasses.dataclass
class _Bytes:
    offset: int
    length: int
    short: bytes


@dataclasses.dataclass
class _Dtype:
    name: str
    built: bool = False


@dataclasses.dataclass
class _Array:
    span: ArraySpan | None = None


@dataclasses.dataclass
class _Quantized:
    fields: dict[str, ArraySpan] | None = None


class _Mark:
    pass


def read_header(path: Location, tensor: str | None = None) -> TensorFile:
    """Reads the header of a tensor file; `tensor` names it in errors.

    Raises:
      CheckpointError: the file is missing, truncated, or contains anything but one array of a known type or one
        QuantizedWeight8bit.
    """
    try:
        data = Window(path)
        if not len(data):
            raise CheckpointError(path, "the file is empty", tensor=tensor, offset=0)
        return _Walk(path, tensor, data).run()
    except OSError as error:
        raise CheckpointError(path, f"can't be read: {error.strerror}", tensor=tensor) from error


class _Walk:
    """A pickle machine whose objects are descriptions."""

    def __init__(self, path: Location, tensor: str | None, data: Window) -> None:
        self._path = path
        self._tensor = tensor
        self._data = data
        self._at = 0
        self._opcode_at = 0
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}

    def run(self) -> TensorFile:
        for _ in range(_MAX_OPCODES):
            self._opcode_at = self._at
            opcode = self._take(1)
            if opcode == b".":
                return self._result()
            self._step(opcode)
        self._fail(f"no tensor after {_MAX_OPCODES} opcodes")

    def _result(self) -> TensorFile:
        if self._at != len(self._data):
            self._fail(f"{len(self._data) - self._at} bytes follow the end of the pickle")
        match self._stack:
            case [_Array(span=ArraySpan() as span)]:
                return TensorFile(self._path, span, None)
            case [_Quantized(fields={"weight": weight, "scales": scales})]:
                if weight.dtype != np.int8 or scales.dtype == np.int8:
                    self._fail(
                        f"quantized weight of {weight.dtype} with scales of {scales.dtype}; expected int8 and float"
                    )
                return TensorFile(self._path, weight, scales)
        self._fail("the pickle holds no array and no QuantizedWeight8bit")

    def _step(self, opcode: bytes) -> None:
        if opcode in _PUSHES:
            self._stack.append(_PUSHES[opcode](self))
        elif opcode in _DOES:
            _DOES[opcode](self)
        else:
            self._fail(f"pickle opcode {opcode!r} has no place in a tensor file; nothing was executed")

    def _protocol(self) -> None:
        version = self._take(1)[0]
        if version > 5:
            self._fail(f"pickle protocol {version} is unknown")

    def _byte(self) -> int:
        return self._take(1)[0]

    def _memoize(self, place: int) -> None:
        self._memo[place] = self._top()

    def _build_top(self) -> None:
        (state,) = self._pop(1)
        self._build(self._top(), state)

    def _global(self, module: Any, name: Any) -> _Global:
        if not (isinstance(module, str) and isinstance(name, str)):
            self._fail("a class or function whose name is no text")
        found = (module, name)
        if found in _RECONSTRUCT or found in _QUANTIZED or found in (_NDARRAY, _DTYPE, _BFLOAT16):
            return _Global(found)
        self._fail(f"refers to {module}.{name}, which has no place in a tensor file; nothing was executed")

    def _new(self, cls: Any, arguments: Any) -> _Quantized:
        if isinstance(cls, _Global) and cls.name in _QUANTIZED and arguments == ():
            return _Quantized()
        self._fail("makes an object that is no QuantizedWeight8bit")

    def _call(self, function: Any, arguments: Any) -> _Array | _Dtype:
        match function, arguments:
            case _Global(name=name), (_Global(name=kind), (0,), _Bytes(short=b"b")) if (
                name in _RECONSTRUCT and kind == _NDARRAY
            ):
                return _Array()
            case _Global(name=name), (str() as code, False, True) if name == _DTYPE and code in _DTYPES:
                return _Dtype(code)
            case _Global(name=name), (_Global(name=kind), False, True) if name == _DTYPE and kind == _BFLOAT16:
                return _Dtype("bfloat16")
        self._fail(f"calls {_named(function)}, which makes no array of a known type so; nothing was executed")

    def _build(self, target: Any, state: Any) -> None:
        match target, state:
            case _Dtype(built=False), (3, "|" | "<", None, None, None, int(), int(), int()):
                target.built = True
            case _Array(span=None), (1, tuple() as shape, _Dtype(built=True, name=name), False, _Bytes() as payload):
                target.span = self._span(shape, _DTYPES[name], payload)
            case _Quantized(fields=None), {
                "weight": _Array(span=ArraySpan() as w),
                "scales": _Array(span=ArraySpan() as s),
            }:
                if len(state) != 2:
                    self._fail(f"a QuantizedWeight8bit with fields {sorted(state)}; expected weight and scales")
                target.fields = {"weight": w, "scales": s}
            case _Array(), (1, _, _, True, _):
                self._fail("has an array in Fortran's order; write it with numpy.ascontiguousarray")
            case _Dtype(), (3, ">", *_):
                self._fail("has an array of big-endian numbers; write it with array.astype of a little-endian type")
            case _:
                self._fail(f"an object state that is not an array's, but a {type(state).__name__}")

    def _span(self, shape: tuple[Any, ...], dtype: np.dtype[Any], payload: _Bytes) -> ArraySpan:
        if not all(type(n) is int and 0 < n < 2**40 for n in shape):
            self._fail("an array shape that is none")
        span = ArraySpan(shape, dtype, payload.offset)
        if span.nbytes != payload.length:
            self._fail(f"array of shape {shape} and type {dtype} has {payload.length} bytes; needs {span.nbytes}")
        return span

    def _set_items(self, items: list[Any]) -> None:
        target = self._top()
        keys, values = items[::2], items[1::2]
        if not isinstance(target, dict) or len(keys) != len(values) or not all(isinstance(k, str) for k in keys):
            self._fail("a dictionary that is no object state")
        target.update(zip(keys, values, strict=True))

    def _take(self, count: int) -> bytes:
        if count > len(self._data) - self._at:
            self._fail(f"truncated: {count} more bytes expected, {len(self._data) - self._at} there")
        taken = self._data[self._at : self._at + count]
        self._at += count
        return taken

    def _unsigned(self, layout: str) -> int:
        (value,) = struct.unpack(layout, self._take(struct.calcsize(layout)))
        return int(value)

    def _text(self, length: int) -> str:
        if length > _MAX_STRING:
            self._fail(f"a string of {length} bytes")
        try:
            return self._take(length).decode()
        except UnicodeDecodeError:
            self._fail("a string that is not UTF-8")

    def _line(self) -> str:
        end = self._data.find(b"\n", self._at, self._at + _MAX_STRING)
        if end < 0:
            self._fail("a name without end")
        text = self._text(end - self._at)
        self._at = end + 1
        return text

    def _payload(self, length: int) -> _Bytes:
        offset = self._at
        if length > len(self._data) - offset:
            self._fail(f"truncated: {length} bytes of payload expected, {len(self._data) - offset} there")
        self._at += length
        return _Bytes(offset, length, self._data[offset : offset + min(length, 1)])

    def _recall(self, index: int) -> Any:
        if index not in self._memo:
            self._fail(f"memo entry {index} was never stored")
        return self._memo[index]

    def _top(self) -> Any:
        if not self._stack or isinstance(self._stack[-1], _Mark):
            self._fail("the pickle's stack is empty")
        return self._stack[-1]

    def _pop(self, count: int) -> list[Any]:
        taken = self._stack[-count:]
        if len(taken) < count or any(isinstance(item, _Mark) for item in taken):
            self._fail("the pickle's stack is empty")
        del self._stack[-count:]
        return taken

    def _pop_to_mark(self) -> list[Any]:
        for i in range(len(self._stack) - 1, -1, -1):
            if isinstance(self._stack[i], _Mark):
                taken = self._stack[i + 1 :]
                del self._stack[i:]
                return taken
        self._fail("a tuple or dictionary without beginning")

    def _fail(self, problem: str) -> NoReturn:
        raise CheckpointError(self._path, problem, tensor=self._tensor, offset=self._opcode_at)


def _named(function: Any) -> str:
    """What is called, by name only: arguments may share parts, and be endless to print."""
    return ".".join(function.name) if isinstance(function, _Global) else type(function).__name__


#: The opcodes that push something, and what.
_PUSHES: dict[bytes, Callable[[_Walk], Any]] = {
    b"\x8c": lambda walk: walk._text(walk._byte()),  # SHORT_BINUNICODE
    b"X": lambda walk: walk._text(walk._unsigned("<I")),  # BINUNICODE
    b"C": lambda walk: walk._payload(walk._byte()),  # SHORT_BINBYTES
    b"B": lambda walk: walk._payload(walk._unsigned("<I")),  # BINBYTES
    b"\x8e": lambda walk: walk._payload(walk._unsigned("<Q")),  # BINBYTES8
    b"K": lambda walk: walk._byte(),  # BININT1
    b"M": lambda walk: walk._unsigned("<H"),  # BININT2
    b"J": lambda walk: walk._unsigned("<i"),  # BININT
    b"\x8a": lambda walk: int.from_bytes(walk._take(walk._byte()), "little", signed=True),  # LONG1
    b"N": lambda _: None,
    b"\x88": lambda _: True,  # NEWTRUE
    b"\x89": lambda _: False,  # NEWFALSE
    b"(": lambda _: _Mark(),
    b")": lambda _: (),
    b"}": lambda _: {},
    b"\x85": lambda walk: tuple(walk._pop(1)),  # TUPLE1
    b"\x86": lambda walk: tuple(walk._pop(2)),  # TUPLE2
    b"\x87": lambda walk: tuple(walk._pop(3)),  # TUPLE3
    b"t": lambda walk: tuple(walk._pop_to_mark()),
    b"h": lambda walk: walk._recall(walk._byte()),  # BINGET
    b"j": lambda walk: walk._recall(walk._unsigned("<I")),  # LONG_BINGET
    b"\x93": lambda walk: walk._global(*walk._pop(2)),  # STACK_GLOBAL
    b"c": lambda walk: walk._global(walk._line(), walk._line()),  # GLOBAL
    b"\x81": lambda walk: walk._new(*walk._pop(2)),  # NEWOBJ
    b"R": lambda walk: walk._call(*walk._pop(2)),  # REDUCE
}
#: Those that push nothing.
_DOES: dict[bytes, Callable[[_Walk], object]] = {
    b"\x80": _Walk._protocol,  # PROTO
    b"\x95": lambda walk: walk._take(8),  # FRAME
    b"\x94": lambda walk: walk._memoize(len(walk._memo)),  # MEMOIZE
    b"q": lambda walk: walk._memoize(walk._byte()),  # BINPUT
    b"s": lambda walk: walk._set_items(walk._pop(2)),  # SETITEM
    b"u": lambda walk: walk._set_items(walk._pop_to_mark()),  # SETITEMS
    b"b": _Walk._build_top,  # BUILD
}
