"""What a host has loaded is mapped the next time, whatever has become of its files."""

from __future__ import annotations

import dataclasses
import logging
import os
import pathlib
import shutil
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import pytest

from tests.conftest import GOLDEN
from workers.checkpoint.checkpoint import open_checkpoint
from workers.checkpoint.loader import LoadProgress, Params, load_parameters
from workers.kernels.cpu.kernels import native_kernels
from workers.kernels.interface import PORTABLE, Kernels
from workers.messages.specs import WeightsAddress
from workers.model.partition import Partition

NATIVE = native_kernels()
PAIRED = dataclasses.replace(PORTABLE, paired=True)
MESHES = {1: (1, 1), 8: (2, 4)}


@pytest.fixture
def checkpoint(tmp_path: pathlib.Path) -> pathlib.Path:
    """A copy of the small golden one."""
    return pathlib.Path(shutil.copytree(GOLDEN / "nano-s1", tmp_path / "nano"))


def load(
    checkpoint: pathlib.Path,
    cache: pathlib.Path,
    kernels: Kernels = NATIVE,
    devices: int = 8,
    weights: str = "int8",
    twins: Sequence[WeightsAddress] = (),
) -> tuple[Params, LoadProgress]:
    """Loads a checkpoint onto devices of this process."""
    opened = open_checkpoint(checkpoint)
    devices_ = np.array(jax.devices()[:devices]).reshape(MESHES[devices])
    partition = Partition.create(opened.config, jax.sharding.Mesh(devices_, ("data", "model")), "tensor", kernels)
    return load_parameters(opened, partition, weights=weights, cache=cache, twins=twins)


def same(one: Params, other: Params) -> None:
    """Asserts that these are the same parameters."""
    assert str(jax.tree.structure(one)) == str(jax.tree.structure(other))
    for first, second in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert first.sharding == second.sharding
        np.testing.assert_array_equal(np.asarray(first), np.asarray(second))


@pytest.mark.parametrize("devices", [1, 8])
@pytest.mark.parametrize(
    ("kernels", "weights"),
    [
        (NATIVE, "int8"),
        (NATIVE, "int4"),
        (PORTABLE, "int8"),
        (PORTABLE, "int4"),
        (PAIRED, "int4"),
        (PORTABLE, "bfloat16"),
    ],
    ids=["packed", "packed int4", "int8", "int4", "paired", "bfloat16"],
)
def test_the_second_load_reads_nothing(
    checkpoint: pathlib.Path, tmp_path: pathlib.Path, kernels: Kernels, weights: str, devices: int
) -> None:
    first, read = load(checkpoint, tmp_path / "cache", kernels, devices, weights)
    again, mapped = load(checkpoint, tmp_path / "cache", kernels, devices, weights)
    same(again, first)
    assert (mapped.read, mapped.total) == (0, 0)
    assert read.read == read.total > 0
    assert mapped.mapped >= sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(first))
    assert mapped.digests == read.digests
    assert mapped.tensors == read.tensors


def test_cpu_devices_compute_on_the_files_themselves(checkpoint: pathlib.Path, tmp_path: pathlib.Path) -> None:
    for _ in range(2):
        params, _ = load(checkpoint, tmp_path / "cache")
        mapped = [
            tuple(int(part, 16) for part in line.split()[0].split("-"))
            for line in pathlib.Path("/proc/self/maps").read_text().splitlines()
            if str(tmp_path / "cache") in line
        ]
        for leaf in jax.tree.leaves(params):
            for shard in leaf.addressable_shards:
                address = shard.data.unsafe_buffer_pointer()
                assert any(start <= address < end for start, end in mapped), leaf.shape


def spoil_bytes(cache: pathlib.Path) -> None:
    """Changes a bit of a cache's largest matrix."""
    largest = max(cache.rglob("*linear*"), key=lambda path: path.stat().st_size)
    with largest.open("r+b") as file:
        file.seek(largest.stat().st_size // 2)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 1]))


def _spoil_length(cache: pathlib.Path) -> None:
    path = next(cache.rglob("*router*"))
    os.truncate(path, path.stat().st_size - 1)


def _spoil_index(cache: pathlib.Path) -> None:
    path = next(cache.rglob("index.json"))
    path.write_text(path.read_text()[:-10])


def _take_file_away(cache: pathlib.Path) -> None:
    next(cache.rglob("*embeddings*")).unlink()


@pytest.mark.parametrize("spoil", [spoil_bytes, _spoil_length, _spoil_index, _take_file_away])
def test_what_is_broken_is_read_again(
    checkpoint: pathlib.Path, tmp_path: pathlib.Path, spoil: Any, caplog: pytest.LogCaptureFixture
) -> None:
    _, read = load(checkpoint, tmp_path / "cache")
    spoil(tmp_path / "cache")
    with caplog.at_level(logging.WARNING):
        again, progress = load(checkpoint, tmp_path / "cache")
    same(again, load(checkpoint, tmp_path / "another")[0])
    assert (progress.read, progress.mapped) == (read.read, 0)
    assert "the checkpoint is read" in caplog.text
    assert load(checkpoint, tmp_path / "cache")[1].read == 0


def test_another_checkpoint_or_form_is_another_cache(checkpoint: pathlib.Path, tmp_path: pathlib.Path) -> None:
    cache = tmp_path / "cache"
    load(checkpoint, cache)
    assert load(checkpoint, cache, PORTABLE)[1].read > 0
    assert load(checkpoint, cache, devices=1)[1].read > 0
    os.utime(checkpoint / "ckpt-0" / "tensor00003_000")
    assert load(checkpoint, cache)[1].read > 0


LOAD = """
import pathlib, sys
import jax
jax.config.update("jax_platforms", "cpu")
from workers.checkpoint.checkpoint import open_checkpoint
from workers.checkpoint.loader import load_parameters
from workers.model.partition import Partition
from workers.runtime.mesh import make_mesh
checkpoint = open_checkpoint(pathlib.Path(sys.argv[1]))
partition = Partition.create(checkpoint.config, make_mesh(1, 1))
params, progress = load_parameters(checkpoint, partition, cache=pathlib.Path(sys.argv[2]))
print(progress.read)
"""


def test_what_no_process_uses_makes_room_for_another_model(checkpoint: pathlib.Path, tmp_path: pathlib.Path) -> None:
    cache, other = tmp_path / "cache", tmp_path / "other"
    shutil.copytree(checkpoint, other)
    program = [sys.executable, "-c", LOAD]
    subprocess.run([*program, str(checkpoint), str(cache)], check=True)
    (left,) = cache.iterdir()
    (left / "dead.1.partial").mkdir()  # by a process that was killed
    subprocess.run([*program, str(checkpoint), str(cache)], check=True)
    assert not (left / "dead.1.partial").exists()
    subprocess.run([*program, str(other), str(cache)], check=True)
    (kept,) = cache.iterdir()
    assert kept != left
    load(other, cache, PORTABLE, devices=1)  # which this process now uses
    subprocess.run([*program, str(checkpoint), str(cache)], check=True)
    assert kept.exists()
    assert load(other, cache, PORTABLE, devices=1)[1].read == 0


def test_without_space_nothing_is_kept(
    checkpoint: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    room = [1 << 20]

    def allocate(descriptor: int, offset: int, length: int) -> None:
        del descriptor, offset
        room[0] -= length
        if room[0] < 0:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", allocate)
    with caplog.at_level(logging.WARNING):
        params, _ = load(checkpoint, tmp_path / "cache")
    assert "no weights cache: [Errno 28]" in caplog.text
    assert not list((tmp_path / "cache").rglob("*.0"))
    same(params, load(checkpoint, tmp_path / "another")[0])


def test_another_users_folder_is_left_alone(
    checkpoint: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    with caplog.at_level(logging.WARNING):
        load(checkpoint, tmp_path / "cache")
    assert "belongs to another user" in caplog.text
    assert list((tmp_path / "cache").iterdir()) == []
