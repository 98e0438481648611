"""Digests of the parts of a checkpoint that devices hold, so that a byte that changed on one host's disk is noticed.

A part is named by its file, where the array begins in it, and its bounds: on every host and for every
replica its bytes must be the same.
"""

from __future__ import annotations

import itertools
import json
import math
import pathlib
from collections.abc import Iterator

import numpy as np
from isal import isal_zlib

from workers.checkpoint.checkpoint import Checkpoint
from workers.checkpoint.errors import CheckpointError
from workers.checkpoint.reading import Bounds, read_slice
from workers.checkpoint.storage import Location
from workers.checkpoint.tensor_file import ArraySpan, TensorFile
from workers.kernels.packing import Array
from workers.model.layout import Layout
from workers.model.parameters import ParameterInfo

#: Of recorded digests, beside ckpt-0.
FILE = "digests.json"


def part_name(file: Location, span: ArraySpan, bounds: Bounds) -> str:
    """The name of a part of an array."""
    return f"{file.name}@{span.offset}[{','.join(f'{start}:{stop}' for start, stop in bounds)}]"


def digest(part: Array) -> int:
    """Of a part's bytes: CRC-32, which is faster than disks are. It is against accidents, not against attackers."""
    return isal_zlib.crc32(np.ascontiguousarray(part).reshape(-1).view(np.uint8).data)


def read_record(checkpoint: Location) -> dict[str, int]:
    """The digests that are recorded beside a checkpoint; empty if none are. Raises CheckpointError."""
    path = checkpoint / FILE
    if not path.is_file():
        return {}
    try:
        record = json.loads(path.read_text())
        return {str(name): int(value) for name, value in record.items()}
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise CheckpointError(path, f"holds no digests: {error}; `grokmesh inspect --digest` writes it") from error


def record(checkpoint: Checkpoint, directory: pathlib.Path, layout: Layout) -> int:
    """Reads all parts that a mesh of `layout` holds, and adds their digests to those recorded beside the checkpoint. Returns
    how many there are now. Raises CheckpointError."""
    known = read_record(directory)
    for info, file in checkpoint.tensors:
        for span, bounds in _parts(info, file, layout):
            try:
                part = read_slice(file.path, span, bounds)
            except OSError as error:
                raise CheckpointError(file.path, f"can't be read: {error}", tensor=info.path) from error
            known[part_name(file.path, span, bounds)] = digest(part)
    (directory / FILE).write_text(json.dumps(known, indent=0, sort_keys=True))
    return len(known)


def _parts(info: ParameterInfo, file: TensorFile, layout: Layout) -> Iterator[tuple[ArraySpan, Bounds]]:
    """The parts of a tensor's arrays, as the loader reads them."""
    ways = [layout.ways(layout.axes(name)) for name in info.axes]
    for bounds in _split(file.values.shape, ways):
        yield file.values, bounds
    if file.scales is None:
        return
    groups = file.scales.shape[-2]
    kept = layout.scale_groups(groups, info.axes[-2])
    shape = (*file.scales.shape[:-2], kept, file.scales.shape[-1])
    ways = [layout.ways(layout.axes(name)) for name in layout.scale_axes(kept, info.axes)]
    parts = dict.fromkeys(
        (*bounds[:-2], source_groups(bounds[-2], kept // groups), bounds[-1]) for bounds in _split(shape, ways)
    )
    for bounds in parts:
        yield file.scales, bounds


def source_groups(kept: tuple[int, int], repeats: int) -> tuple[int, int]:
    """Which groups of scales those of `kept` ones are, each of which is there `repeats` times."""
    return kept[0] // repeats, -(-kept[1] // repeats)


def _split(shape: tuple[int, ...], ways: list[int]) -> Iterator[Bounds]:
    """The bounds of equal parts, so many along each dimension."""
    assert all(size % parts == 0 for size, parts in zip(shape, ways, strict=True)), (shape, math.prod(ways))
    each = (
        [(i * size // parts, (i + 1) * size // parts) for i in range(parts)]
        for size, parts in zip(shape, ways, strict=True)
    )
    yield from itertools.product(*each)
