"""Checkpoint directories: configuration, inference, and what is wrong said where it is wrong."""

from __future__ import annotations

import json
import pathlib
import shutil

import numpy as np
import pytest

from cluster.cli import main
from tests.conftest import GOLDEN
from tools.checkpoint_writer import write_array, write_quantized
from workers.checkpoint.checkpoint import open_checkpoint
from workers.checkpoint.errors import CheckpointError
from workers.model.config import ConfigError, GrokConfig, ffn_size
from workers.model.parameters import parameter_table


@pytest.fixture
def copy(tmp_path: pathlib.Path) -> pathlib.Path:
    """A copy of a golden checkpoint that may be spoilt."""
    return pathlib.Path(shutil.copytree(GOLDEN / "nano-s1", tmp_path / "copy"))


def test_parameters_come_in_the_order_of_the_manifest(golden: pathlib.Path) -> None:
    manifest = json.loads((golden / "manifest.json").read_text())
    table = parameter_table(GrokConfig.load(golden / "config.json"))
    assert [(info.path, list(info.shape)) for info in table] == [(entry["path"], entry["shape"]) for entry in manifest]


def test_the_release_has_its_published_shapes() -> None:
    config = GrokConfig()
    table = parameter_table(config)
    assert ffn_size(6144, 8) == config.ffn_size == 32768
    assert len(table) == 770
    assert sum(info.quantized for info in table) == 448
    assert round(sum(info.size for info in table) / 1e9, 1) == 315.7
    # Layer 10 follows layer 1: the order is that of text.
    assert "decoder_layer_10/" in table[2 + 2 * 12].path


SHAPE = {"emb_size": 64, "num_layers": 1, "num_q_heads": 4, "num_kv_heads": 2, "ffn_size": 64, "vocab_size": 96}


def _without_config(directory: pathlib.Path, key_size: int) -> None:
    """Writes a checkpoint of SHAPE without config.json."""
    (directory / "ckpt-0").mkdir(parents=True)
    config = GrokConfig(**SHAPE, key_size=key_size)
    for i, info in enumerate(parameter_table(config)):
        path = directory / "ckpt-0" / f"tensor{i:05d}_000"
        if info.quantized:
            scales = np.ones((*info.shape[:-2], 1, info.shape[-1]), np.float32)
            write_quantized(path, np.zeros(info.shape, np.int8), scales)
        else:
            write_array(path, np.zeros(info.shape, np.float32))


def test_without_config_json_shapes_are_inferred_and_multipliers_are_those_of_grok_1(tmp_path: pathlib.Path) -> None:
    _without_config(tmp_path, key_size=128)
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.inferred
    assert checkpoint.config == GrokConfig(**SHAPE)


def test_heads_that_can_not_be_those_of_grok_1_need_a_config_json(tmp_path: pathlib.Path) -> None:
    _without_config(tmp_path, key_size=48)
    with pytest.raises(CheckpointError, match=r"config\.json: is missing, .* write a config\.json with key_size"):
        open_checkpoint(tmp_path)


def test_integers_without_scales_are_refused(copy: pathlib.Path) -> None:
    write_array(copy / "ckpt-0" / "tensor00005_000", np.zeros((128, 64), np.int8))
    with pytest.raises(CheckpointError, match=r"tensor00005_000 \(.*key/w\): holds integers without scales"):
        open_checkpoint(copy)


def test_a_missing_file_is_named(copy: pathlib.Path) -> None:
    (copy / "ckpt-0" / "tensor00007_000").unlink()
    with pytest.raises(CheckpointError, match="tensor00007_000: is missing"):
        open_checkpoint(copy)


def test_a_stranger_among_the_files_is_named(copy: pathlib.Path) -> None:
    (copy / "ckpt-0" / "readme.txt").write_text("hello")
    with pytest.raises(CheckpointError, match=r"readme\.txt: is no tensor file"):
        open_checkpoint(copy)


def test_two_files_exchanged_are_noticed(copy: pathlib.Path) -> None:
    folder = copy / "ckpt-0"
    shutil.copy(folder / "tensor00005_000", folder / "tensor00007_000")
    with pytest.raises(CheckpointError, match=r"tensor00007_000 \(.*query/w\): has shape \(128, 64\); .* \(128, 128\)"):
        open_checkpoint(copy)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_layers": 3}, "holds 26 tensors; a model of 3 layers has 38"),
        ({"num_q_heads": 15}, "num_q_heads=15 is not a multiple of num_kv_heads=8"),
        ({"emb_size": "128"}, "emb_size='128' is not an integer"),
        ({"eos_token": 5000}, "eos_token=5000 is outside the vocabulary of 1024"),
        ({"attn_output_multiplier": 0}, "attn_output_multiplier=0"),
        ({"attn_logit_cap": 50}, "attn_logit_cap=50.0 exceeds 40.0"),
    ],
)
def test_a_wrong_configuration_is_explained(copy: pathlib.Path, change: dict[str, object], message: str) -> None:
    path = copy / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises((CheckpointError, ConfigError), match=message):
        open_checkpoint(copy)


def test_inspect_lists_tensors_and_configuration(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(GOLDEN / "nano-s1")]) == 0
    shown = capsys.readouterr().out
    assert "tensor00003_000   transformer/decoder_layer_0/moe/linear_1/w" in shown
    assert "26 tensors, 1,412,224 parameters, 1,865,216 bytes" in shown
    assert "num_kv_heads: 8" in shown


def test_inspect_of_no_checkpoint_says_so(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(tmp_path)]) == 2
    assert "is no directory; a checkpoint is DIR/ckpt-0/" in capsys.readouterr().err
