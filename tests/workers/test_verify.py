"""`grokmesh verify` passes on what is right, on meshes and hosts, and fails on one wrong value."""

from __future__ import annotations

import json
import pathlib
import shutil
from collections.abc import Callable

import numpy as np
import pytest

from cluster.cli import main
from tests.conftest import GOLDEN

NANO = GOLDEN / "nano-s1"


def _verify(checkpoint: pathlib.Path, golden: pathlib.Path, mesh: str = "1x1", hosts: int = 1, *more: str) -> int:
    arguments = ["--checkpoint", str(checkpoint), "--golden", str(golden), "--mesh", mesh, "--hosts", str(hosts)]
    return main(["verify", *arguments, *more])


@pytest.mark.parametrize(
    ("name", "mesh", "hosts"), [("nano-s1", "1x1", 1), ("text-s1", "2x2", 2), ("nano-s1", "1x8", 2)]
)
def test_golden_sets_pass(name: str, mesh: str, hosts: int, capfd: pytest.CaptureFixture[str]) -> None:
    assert _verify(GOLDEN / name, GOLDEN / name, mesh, hosts) == 0
    shown = capfd.readouterr().out
    assert f"on mesh {mesh}, {hosts} host(s)" in shown
    assert shown.endswith("\nwithin tolerance\n")


def test_bfloat16_activations_err_no_more_than_the_original() -> None:
    assert _verify(NANO, NANO, "1x2", 1, "--activations", "bfloat16", "--weights", "bfloat16") == 0


def test_the_rules_of_xai_give_the_same_numbers() -> None:
    assert _verify(NANO, NANO, "2x2", 1, "--rules", "xai") == 0


def _change_array(file: str, name: str, index: tuple[int, ...], by: float) -> Callable[[pathlib.Path], None]:
    def change(directory: pathlib.Path) -> None:
        with np.load(directory / file) as arrays:
            values = {key: arrays[key] for key in arrays.files}
        values[name][index] += by
        np.savez(directory / file, **values)

    return change


def _change_token(directory: pathlib.Path) -> None:
    _change_array("ref-1x1.npz", "run/greedy0-len9/tokens", (20,), 1)(directory)


def _change_weight(directory: pathlib.Path) -> None:
    path = directory / "ckpt-0" / "tensor00002_000"
    content = bytearray(path.read_bytes())
    content[1000] ^= 1
    path.write_bytes(content)


def _change_multiplier(directory: pathlib.Path) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "attn_output_multiplier": 0.36}))


@pytest.mark.parametrize(
    ("change", "case"),
    [
        (_change_array("exact.npz", "forward/logits-len32/logits", (3, 7), 0.1), "logits-len32"),
        (_change_array("ref-1x1.npz", "forward/logits-len7/logits", (2, 500), 3.0), "logits-len7"),
        (_change_array("exact.npz", "forward/logits-len64/router_gap", (5,), 0.1), "logits-len64"),
        (_change_array("ref-1x1.npz", "run/greedy1-len1/logit_vals", (4, 0), 5.0), "greedy1-len1"),
        (_change_token, "greedy0-len9"),
        (_change_weight, "checksums"),
        (_change_multiplier, "logits-len32"),
    ],
)
def test_one_wrong_value_fails(
    change: Callable[[pathlib.Path], None], case: str, tmp_path: pathlib.Path, capfd: pytest.CaptureFixture[str]
) -> None:
    spoilt = pathlib.Path(shutil.copytree(NANO, tmp_path / "spoilt"))
    change(spoilt)
    assert _verify(spoilt, spoilt) == 1
    failed = [line.split()[0] for line in capfd.readouterr().out.splitlines() if "FAIL" in line]
    assert case in failed


@pytest.mark.parametrize(("mesh", "hosts"), [("2by2", 1), ("1x1", 2), ("0x1", 1)])
def test_an_impossible_mesh_is_refused(mesh: str, hosts: int, capfd: pytest.CaptureFixture[str]) -> None:
    assert _verify(NANO, NANO, mesh, hosts) == 2
    assert "--mesh" in capfd.readouterr().err


def test_no_golden_set_is_refused(tmp_path: pathlib.Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert _verify(NANO, tmp_path) == 2
    assert "no golden set" in capfd.readouterr().err
