"""Parts of arrays read from files: only their own bytes, in little memory, from disks and from object stores."""

from __future__ import annotations

import itertools
import json
import os
import pathlib
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import obstore
import obstore.store
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from obstore.exceptions import GenericError

from tests.conftest import GOLDEN
from tests.support.object_store import URL, object_store
from tests.support.sparse import write_sparse_checkpoint
from workers.checkpoint import reading, storage
from workers.checkpoint.checkpoint import open_checkpoint
from workers.checkpoint.errors import CheckpointError
from workers.checkpoint.inspection import describe
from workers.checkpoint.loader import load_parameters
from workers.checkpoint.reading import Scratch, read_slice
from workers.checkpoint.storage import ObjectPath, locate
from workers.checkpoint.tensor_file import ArraySpan
from workers.messages.specs import LOADING, Progress
from workers.model.config import GrokConfig
from workers.model.partition import Partition
from workers.runtime.mesh import make_mesh

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return tmp_path_factory.mktemp("parts")


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_any_part_of_any_array_is_what_numpy_says(folder: pathlib.Path, data: st.DataObject) -> None:
    shape = tuple(data.draw(st.lists(st.integers(1, 9), min_size=0, max_size=4)))
    bounds = []
    for size in shape:
        start = data.draw(st.integers(0, size - 1))
        bounds.append((start, data.draw(st.integers(start + 1, size))))
    array = np.random.default_rng(0).integers(-128, 128, shape, np.int8).astype(np.int16)
    path = folder / "part"
    path.write_bytes(b"header" + array.tobytes())
    span = ArraySpan(shape, array.dtype, 6)
    counted: list[int] = []
    with pytest.MonkeyPatch.context() as patch:  # small requests, of both kinds
        patch.setattr(reading, "REQUEST_BYTES", data.draw(st.sampled_from([1, 7, 64, 8 << 20])))
        patch.setattr(reading, "_WORTH", {False: data.draw(st.sampled_from([1, 8, 4096]))})
        got = read_slice(path, span, tuple(bounds), counted.append)
    want = array[tuple(slice(*pair) for pair in bounds)]
    np.testing.assert_array_equal(got, want)
    assert sum(counted) == want.nbytes


def test_scratch_memory_is_used_again_for_the_next_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    def addresses(scratch: Scratch) -> list[int]:
        parts = [scratch.take(size) for size in (100, 1, 64)]
        for i, part in enumerate(parts):
            part.fill(i)
        assert [set(part.tolist()) for part in parts] == [{0}, {1}, {2}]
        scratch.clear()
        return [part.ctypes.data for part in parts]

    scratch = Scratch()
    addresses(scratch)
    again = addresses(scratch)
    assert addresses(scratch) == again
    assert not any(address % 64 for address in again)
    monkeypatch.setattr(reading, "_KEPT", 100)
    small = Scratch()
    addresses(small)
    assert small.take(1).base is not small.take(1).base  # nothing is kept


def test_a_file_that_has_become_shorter_is_an_error(tmp_path: pathlib.Path) -> None:
    (tmp_path / "t").write_bytes(b"123")
    with pytest.raises(OSError, match="shorter"):
        read_slice(tmp_path / "t", ArraySpan((8,), np.dtype(np.int8), 0), ((0, 8),))


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    """The URL of a checkpoint in an S3-compatible server."""
    with object_store(GOLDEN / "nano-s1"):
        yield URL


def test_a_checkpoint_in_an_object_store_loads_as_from_a_disk(bucket: str) -> None:
    remote, local = open_checkpoint(locate(bucket)), open_checkpoint(GOLDEN / "nano-s1")
    assert describe(locate(bucket)) == describe(GOLDEN / "nano-s1")
    partition = Partition.create(local.config, make_mesh(4, 2), "batch")
    (from_store, progress), (from_disk, _) = (load_parameters(c, partition) for c in (remote, local))
    assert progress.read == progress.total
    for module, names in from_disk.items():
        for name, value in names.items():
            for mine, theirs in zip(
                *(jax.tree.leaves(tree) for tree in (value, from_store[module][name])), strict=True
            ):
                np.testing.assert_array_equal(np.asarray(mine), np.asarray(theirs))


def test_what_is_missing_in_a_store_is_named(bucket: str) -> None:
    with pytest.raises(CheckpointError, match=r"s3://models/nothing/ckpt-0: is no directory"):
        open_checkpoint(locate("s3://models/nothing"))
    assert not (locate(bucket) / "none").exists()
    with pytest.raises(OSError, match="nowhere"):
        locate("nowhere://at/all")


def test_requests_that_fail_are_tried_again(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "_BACKOFF", 0.001)
    real, calls = obstore.get_range, itertools.count()

    def flaky(*arguments: Any, **options: Any) -> object:
        if (next(calls) + 1) % 3:
            raise GenericError("the connection was reset")
        return real(*arguments, **options)

    monkeypatch.setattr(obstore, "get_range", flaky)
    path = locate(bucket) / "config.json"
    assert isinstance(path, ObjectPath)
    assert json.loads(path.read_text()) == json.loads((GOLDEN / "nano-s1" / "config.json").read_text())
    assert next(calls) == 3

    def broken(*_: object, **__: object) -> object:
        raise GenericError("the connection was reset")

    monkeypatch.setattr(obstore, "get_range", broken)
    with pytest.raises(OSError, match="connection was reset"):
        path.read_bytes()


#: Every so many tensors are read; 7 meets all kinds. GROKMESH_TENSORS=1 reads them all, 81 GB.
STEP = int(os.environ.get("GROKMESH_TENSORS", "7"))

#: Reads the shards of one host in a process of its own, part by part, and prints bytes and the largest memory it had.
READ = """
import math, pathlib, resource, sys
from workers.messages.specs import LOADING, Progress
from workers.capacity.planner import layout_of
from workers.checkpoint.checkpoint import open_checkpoint
from workers.checkpoint.reading import read_slice

checkpoint = open_checkpoint(pathlib.Path(sys.argv[1]))
layout = layout_of(checkpoint.config, 2, 8, "batch")
read = largest = 0
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
for info, file in checkpoint.tensors[:: int(sys.argv[2])]:
    # Host 0 has the first four of sixteen devices: of what both axes split, the first quarter.
    local = layout.local(info.shape, info.axes)
    ways = [layout.ways(layout.axes(name)) for name in info.axes]
    bounds = tuple((0, size * min(4, way)) for size, way in zip(local, ways))
    part = read_slice(file.path, file.values, bounds)
    read, largest = read + part.nbytes, max(largest, part.nbytes)
    del part
print(read, largest, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before)
"""


def test_a_full_size_checkpoint_is_inspected_and_read_by_one_host_of_four(tmp_path: pathlib.Path) -> None:
    """All 770 tensors of the release with their headers; their values are holes, which read as zeros."""
    write_sparse_checkpoint(tmp_path, GrokConfig())
    on_disk = sum(path.stat().st_blocks * 512 for path in tmp_path.rglob("*") if path.is_file())
    assert on_disk < 50e6
    text = describe(tmp_path)
    assert "770 tensors, 315,684,820,992 parameters" in text
    sizes = {path.name: path.stat().st_size for path in (tmp_path / "ckpt-0").iterdir()}
    assert sizes["tensor00002_000"] == 1_611_137_347  # as published scans of the release say
    assert sizes["tensor00003_000"] == 1_611_399_491
    done = subprocess.run(
        [sys.executable, "-c", READ, str(tmp_path), str(STEP)], capture_output=True, text=True, check=True
    )
    read, largest, extra = map(int, done.stdout.split())
    print(f"{read:,} bytes read, {largest:,} the largest part, {extra:,} of memory")
    assert read / 1e9 == pytest.approx(81 / STEP, rel=0.1)
    assert extra < 1.3 * largest + 16 * reading.REQUEST_BYTES


def test_progress_is_told_with_the_time_that_is_left() -> None:
    told = Progress(LOADING, 0.25, 4, bytes_read=20 * 10**9, bytes_total=80 * 10**9, bytes_per_second=2e9)
    assert told.loading == "[#####...............] 20.00 of 80.00 GB, 2.00 GB/s, 30 s left"
