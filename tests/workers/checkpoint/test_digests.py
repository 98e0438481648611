"""Bytes that changed are noticed: what hosts load has the digests that were recorded."""

from __future__ import annotations

import json
import pathlib
import shutil

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from cluster.cli import main
from tests.conftest import GOLDEN
from workers.checkpoint.checkpoint import open_checkpoint
from workers.checkpoint.digests import FILE, read_record
from workers.checkpoint.errors import CheckpointError
from workers.checkpoint.loader import load_parameters
from workers.kernels.interface import PORTABLE
from workers.model.partition import Partition


def _loaded(checkpoint: pathlib.Path, data: int, model: int, rules: str) -> dict[str, int]:
    opened = open_checkpoint(checkpoint)
    mesh = Mesh(np.array(jax.devices()[: data * model]).reshape(data, model), ("data", "model"))
    partition = Partition.create(opened.config, mesh, rules, PORTABLE)
    return load_parameters(opened, partition)[1].digests


@pytest.mark.parametrize(
    ("mesh", "rules"), [((1, 1), "tensor"), ((2, 4), "tensor"), ((4, 2), "batch"), ((2, 2), "xai")]
)
def test_all_that_any_mesh_loads_is_recorded(mesh: tuple[int, int], rules: str, tmp_path: pathlib.Path) -> None:
    checkpoint = tmp_path / "nano"
    shutil.copytree(GOLDEN / "nano-s1", checkpoint)
    assert main(["inspect", str(checkpoint), "--digest", f"{mesh[0]}x{mesh[1]}", "--rules", rules]) == 0
    record, loaded = read_record(checkpoint), _loaded(checkpoint, *mesh, rules)
    assert loaded
    assert {part: record.get(part) for part in loaded} == loaded
    tensor = checkpoint / "ckpt-0" / "tensor00002_000"
    changed = bytearray(tensor.read_bytes())
    changed[len(changed) // 2] ^= 1
    tensor.write_bytes(changed)
    assert sum(record[part] != value for part, value in _loaded(checkpoint, *mesh, rules).items()) == 1


def test_records_of_several_meshes_are_kept_side_by_side(tmp_path: pathlib.Path) -> None:
    checkpoint = tmp_path / "nano"
    shutil.copytree(GOLDEN / "nano-s1", checkpoint)
    for mesh in ("1x1", "1x2"):
        assert main(["inspect", str(checkpoint), "--digest", mesh]) == 0
    record = read_record(checkpoint)
    assert {*_loaded(checkpoint, 1, 1, "tensor"), *_loaded(checkpoint, 1, 2, "tensor")} <= record.keys()
    (checkpoint / FILE).write_text(json.dumps([1]))
    with pytest.raises(CheckpointError, match=r"digests\.json: holds no digests"):
        read_record(checkpoint)


@pytest.mark.parametrize("mesh", ["2", "0x1", "2x", "axb"])
def test_what_is_no_mesh_is_refused(mesh: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(GOLDEN / "nano-s1"), "--digest", mesh]) == 2
    assert "is no DATAxMODEL" in capsys.readouterr().err
