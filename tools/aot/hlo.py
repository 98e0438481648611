"""What a compiled program's text shows: which sums and gathers cross devices, and which buffers are as large as weights."""

from __future__ import annotations

import collections
import dataclasses
import math
import re
from collections.abc import Iterator

_BYTES = {
    "pred": 1, "s4": 0.5, "u4": 0.5, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2,
    "s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8,
}  # fmt: skip
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) .*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?[\w.\-]+ = (.+?) ([a-z][\w\-]*)\(")
_ARRAY = re.compile(r"\b([a-z]+\d*)\[([\d,]*)\](\{[^}]*\})?")
#: Of a layout: that the array is in a TPU's own vector memory.
_ON_CHIP = "S(1)"
_COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute", "ragged-all-to-all")
#: Operations that make no buffer of their own.
_VIEWS = ("parameter", "get-tuple-element", "bitcast", "tuple", "while", "conditional", "constant", "scatter", "call")


@dataclasses.dataclass(frozen=True)
class Traffic:
    """One kind of collective.

    Attributes:
      count: how many a run has.
      largest: bytes of the largest's result.
      total: bytes of all results.
    """

    count: int
    largest: int
    total: int


def collectives(text: str) -> dict[str, Traffic]:
    """All collectives of a program, by kind. Those within loops count once."""
    sizes: dict[str, list[int]] = collections.defaultdict(list)
    for kind, operation in _instructions(text):
        name = operation.removesuffix("-start")
        if name in _COLLECTIVES:
            arrays = [size for _, size in _arrays(kind)]
            # What is started returns its operands too.
            sizes[name].append(max(arrays) if operation.endswith("-start") else sum(arrays))
    return {name: Traffic(len(found), max(found), sum(found)) for name, found in sorted(sizes.items())}


def large_buffers(text: str, elements: int, updated: set[tuple[int, ...]]) -> dict[str, int]:
    """Arrays of at least so many elements that the program makes, and how often: `operation type[shape]`.

    Arguments are none, nor are arrays of the shapes in `updated`, which are changed in place.
    """
    found: collections.Counter[str] = collections.Counter()
    for kind, operation in _instructions(text):
        if operation in _VIEWS or operation.endswith(("-done", "-start")):
            continue
        for match in _ARRAY.finditer(kind):
            shape = tuple(int(size) for size in match[2].split(",") if size)
            known = match[1] in _BYTES and tuple(size for size in shape if size != 1) not in updated
            if known and math.prod(shape) >= elements and _ON_CHIP not in (match[3] or ""):
                found[f"{operation} {match[1]}[{match[2]}]"] += 1
    return dict(found)


def _instructions(text: str) -> Iterator[tuple[str, str]]:
    """Type and operation of each instruction that is not inside of a fusion, where nothing is a buffer."""
    fused = False
    for line in text.splitlines():
        if header := _COMPUTATION.match(line):
            fused = "fused" in header[1] or "fusion" in header[1]
        elif not fused and (instruction := _INSTRUCTION.match(line)):
            yield instruction[1], instruction[2]


def _arrays(kind: str) -> Iterator[tuple[str, int]]:
    for match in _ARRAY.finditer(kind):
        if match[1] in _BYTES:
            yield match[1], int(math.prod(int(size) for size in match[2].split(",") if size) * _BYTES[match[1]])
