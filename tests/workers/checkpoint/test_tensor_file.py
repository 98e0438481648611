"""Tensor files are read without unpickling: known ones exactly, all others with an error and without effect."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import pathlib
import pickle

import ml_dtypes
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.conftest import GOLDEN
from tools.checkpoint_writer import write_array, write_quantized
from workers.checkpoint.errors import CheckpointError
from workers.checkpoint.tensor_file import read_header

CHECKPOINT = GOLDEN / "nano-s1" / "ckpt-0"
SMALL = CHECKPOINT / "tensor00005_000"  # a key projection with one group of scales


def test_headers_say_what_the_manifest_says(golden: pathlib.Path) -> None:
    for entry in json.loads((golden / "manifest.json").read_text()):
        file = read_header(golden / "ckpt-0" / f"tensor{entry['i']:05d}_000")
        assert file.values.shape == tuple(entry["shape"])
        assert (list(file.scales.shape) if file.scales else None) == entry.get("scales")
        assert file.values.dtype == (np.int8 if file.scales else np.float32)


def test_a_file_written_again_has_the_same_bytes(golden: pathlib.Path, tmp_path: pathlib.Path) -> None:
    for entry in json.loads((golden / "manifest.json").read_text()):
        file = read_header(golden / "ckpt-0" / f"tensor{entry['i']:05d}_000")
        copy = tmp_path / "copy"
        if file.scales:
            write_quantized(copy, file.map(file.values), file.map(file.scales))
        else:
            write_array(copy, file.map(file.values))
        assert hashlib.sha256(copy.read_bytes()).hexdigest() == entry["sha256"]


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_a_bare_array_has_the_type_that_its_header_names(tmp_path: pathlib.Path, dtype: type) -> None:
    values: np.ndarray = np.arange(12).reshape(3, 4).astype(dtype)
    write_array(tmp_path / "t", values)
    file = read_header(tmp_path / "t")
    assert file.values.dtype == dtype
    np.testing.assert_array_equal(file.map(file.values), values)


def test_arrays_that_numpy_2_pickled_are_read_too(tmp_path: pathlib.Path) -> None:
    values = np.arange(6, dtype=np.float32).reshape(2, 3)
    (tmp_path / "t").write_bytes(pickle.dumps(values, protocol=4))
    file = read_header(tmp_path / "t")
    np.testing.assert_array_equal(file.map(file.values), values)


class _Attack:
    """A pickle that would run a command."""

    def __init__(self, marker: pathlib.Path) -> None:
        self._marker = marker

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch {self._marker}",)


@pytest.mark.parametrize("protocol", range(6))
def test_a_pickle_that_would_execute_code_is_refused_and_does_nothing(tmp_path: pathlib.Path, protocol: int) -> None:
    marker = tmp_path / "executed"
    (tmp_path / "t").write_bytes(pickle.dumps(_Attack(marker), protocol=protocol))
    with pytest.raises(CheckpointError, match=r"t \(layer/w\) at byte \d+: .*nothing was executed"):
        read_header(tmp_path / "t", "layer/w")
    assert not marker.exists()


def test_code_hidden_behind_a_real_array_is_refused(tmp_path: pathlib.Path) -> None:
    marker = tmp_path / "executed"
    attack = pickle.dumps(_Attack(marker), protocol=4)
    (tmp_path / "t").write_bytes(SMALL.read_bytes()[:-1] + attack[2:])
    with pytest.raises(CheckpointError, match="nothing was executed"):
        read_header(tmp_path / "t")
    assert not marker.exists()


@pytest.mark.parametrize("content", [b"", b"\x80\x04", b"not a pickle", pickle.dumps({"a": 1}), pickle.dumps([1, 2])])
def test_foreign_files_are_refused(tmp_path: pathlib.Path, content: bytes) -> None:
    (tmp_path / "t").write_bytes(content)
    with pytest.raises(CheckpointError, match="at byte"):
        read_header(tmp_path / "t")


def test_a_file_cut_anywhere_is_refused(tmp_path: pathlib.Path) -> None:
    content = SMALL.read_bytes()
    for length in [*range(1, 260), len(content) // 2, len(content) - 1]:
        (tmp_path / "t").write_bytes(content[:length])
        with pytest.raises(CheckpointError):
            read_header(tmp_path / "t")


def test_an_error_survives_the_way_from_a_worker(tmp_path: pathlib.Path) -> None:
    error = CheckpointError(tmp_path, "is wrong", tensor="layer/w", offset=7)
    assert str(copy.copy(error)) == str(error) == f"{tmp_path} (layer/w) at byte 7: is wrong"


def test_what_follows_the_tensor_is_refused(tmp_path: pathlib.Path) -> None:
    (tmp_path / "t").write_bytes(SMALL.read_bytes() + b"x")
    with pytest.raises(CheckpointError, match="1 bytes follow"):
        read_header(tmp_path / "t")


@settings(max_examples=500, deadline=None)
@example([(46, 113)])  # a memo entry that is a function, used as a module's name
@given(st.lists(st.tuples(st.integers(0, 220), st.integers(0, 255)), min_size=1, max_size=4))
def test_no_change_of_a_header_gives_anything_but_a_tensor_or_a_checkpoint_error(
    changes: list[tuple[int, int]],
) -> None:
    content = bytearray(SMALL.read_bytes())
    for at, value in changes:
        content[at] = value
    path = pathlib.Path("/tmp") / f"grokmesh-mutated-{os.getpid()}"
    path.write_bytes(content)
    try:
        file = read_header(path)
        assert file.values.offset + file.values.nbytes <= len(content)
    except CheckpointError:
        pass
    finally:
        path.unlink()
