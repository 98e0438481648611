"""`grokmesh verify` passes on what is right, on meshes and hosts, and fails on one wrong value."""

from __future__ import annotations

import json
import pathlib
import shutil
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from cluster.cli import main
from tests.conftest import GOLDEN
from tools.verify.golden import (
    BFLOAT16,
    NATIVE,
    Array,
    GoldenSet,
    Tally,
    Verdict,
    judge_flips,
    judge_forward,
    judge_run,
    router_gaps,
)

pytestmark = pytest.mark.slow

NANO = GOLDEN / "nano-s1"


def _verify(checkpoint: pathlib.Path, golden: pathlib.Path, mesh: str = "1x1", hosts: int = 1, *more: str) -> int:
    arguments = ["--checkpoint", str(checkpoint), "--golden", str(golden), "--mesh", mesh, "--hosts", str(hosts)]
    return main(["verify", *arguments, *more])


@pytest.mark.parametrize(
    ("name", "mesh", "hosts"),
    [("nano-s1", "1x1", 1), ("text-s1", "2x2", 2), ("nano-s1", "1x8", 2), ("head128-s5", "1x2", 1)],
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


def _swap_layers(directory: pathlib.Path) -> None:
    files = directory / "ckpt-0"
    for i in range(2, 14):
        first, second = files / f"tensor{i:05d}_000", files / f"tensor{i + 12:05d}_000"
        content = first.read_bytes()
        first.write_bytes(second.read_bytes())
        second.write_bytes(content)


#: Replaces the router of `kernels` by one that is `wrong`, then verifies.
MUTANT = """
import dataclasses, sys
import jax, jax.numpy as jnp
from workers.kernels.weights import taken
import workers.host.standby
from tools.verify.verify import main
choose = workers.host.standby.select_kernels
def route(x, valid, weight, selected):
    logits = jnp.matmul(x.astype(jnp.float32), taken(weight))
    {wrong}
    probabilities = jax.nn.softmax(logits)
    gates, experts = jax.lax.top_k(probabilities, selected)
    return {gates}, experts, probabilities
workers.host.standby.select_kernels = lambda *a: dataclasses.replace(choose(*a), route=route)
sys.exit(main())
"""


@pytest.mark.parametrize(
    ("wrong", "gates", "rules", "code"),
    [
        ("pass", "gates", "tensor", 0),
        ("logits = 30 * jnp.tanh(logits / 30)", "gates", "tensor", 1),
        ("logits = logits.astype(jnp.bfloat16).astype(jnp.float32)", "gates", "tensor", 1),
        ("pass", "jnp.full_like(gates, 0.5)", "tensor", 1),
        # A norm takes the common factor away but for its epsilon: less than what the native kernels round.
        ("pass", "gates / gates.sum(axis=-1, keepdims=True)", "xai", 1),
    ],
)
def test_wrong_routers_fail(wrong: str, gates: str, rules: str, code: int) -> None:
    program = MUTANT.format(wrong=wrong, gates=gates)
    command = [sys.executable, "-c", program, "--checkpoint", str(NANO), "--golden", str(NANO), "--rules", rules]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    assert found.returncode == code
    assert "Traceback" not in found.stderr


def test_layers_in_another_order_fail(tmp_path: pathlib.Path, capfd: pytest.CaptureFixture[str]) -> None:
    spoilt = pathlib.Path(shutil.copytree(NANO, tmp_path / "spoilt"))
    _swap_layers(spoilt)
    assert _verify(spoilt, NANO) == 1
    failed = [line.split()[0] for line in capfd.readouterr().out.splitlines() if "FAIL" in line]
    assert {"logits-len1", "logits-len7", "logits-len32", "logits-len64", "of"} <= set(failed)


#: A set without a model: T positions of which a hair decides HAIRS, and where the original drew N tokens after them.
T, V, L, E, N = 40, 64, 3, 8, 10
HAIRS = (10, 25)
CASE = {"name": "a", "prompt": list(range(T)), "kind": "greedy", "min_margin_exact": 2.0}


class _Made:
    """The set, and what a right implementation finds: `logits`, `probabilities`; of the run `drawn`, `gaps`."""

    def __init__(self) -> None:
        random = np.random.default_rng(5)
        exact = random.normal(size=(T, V))
        self.logits = exact + 1e-4 * random.normal(size=(T, V))
        routers = np.tile(np.arange(E, dtype=float), (T, L, 1))
        routers[HAIRS, 1, E - 3] = E - 2 - 5e-4
        self.probabilities = np.exp(routers) / np.exp(routers).sum(-1, keepdims=True)
        expected = router_gaps(self.probabilities, 2).min(axis=1)
        self.drawn = random.normal(size=(N, V))
        ids = np.argsort(-self.drawn, axis=-1)[:, :8]
        self.gaps = np.concatenate([expected[:-1], np.ones(N)])
        self.reference: dict[str, Array] = {
            "forward/a/logits": exact + 5e-3 * random.normal(size=(T, V)),
            "trace/router_probs": np.moveaxis(self.probabilities, 1, 0).copy(),
            "run/a/tokens": ids[:, 0],
            "run/a/logit_ids": ids,
            "run/a/logit_vals": np.take_along_axis(self.drawn, ids, -1) + 5e-3 * random.normal(size=(N, 8)),
        }
        self.exact = {"forward/a/logits": exact, "forward/a/router_gap": expected}
        self.golden = GoldenSet(pathlib.Path("made"), (CASE,), (CASE,), self.exact, self.reference, ())

    def forward(self) -> Verdict:
        return judge_forward(self.golden, CASE, self.logits, self.probabilities, 2, NATIVE)

    def run(self, tokens: Array) -> Verdict:
        return judge_run(self.golden, CASE, tokens.tolist(), self.drawn, self.gaps)

    def choose_others(self, position: int) -> None:
        traced: Any = self.reference["trace/router_probs"]
        traced[1, position, [E - 3, E - 2]] = traced[1, position, [E - 2, E - 3]]


def _flip(logits: Array, position: int, carried: float = 3e-3) -> None:
    """Moves all logits of the position by much and those of later ones by little, as a flip does."""
    random = np.random.default_rng(6)
    logits[position] += 0.3 * random.normal(size=V)
    logits[position + 1 :] += carried * random.normal(size=logits[position + 1 :].shape)


def test_right_logits_are_judged_to_the_last() -> None:
    made = _Made()
    verdict = made.forward()
    assert (verdict.problems, verdict.judged) == ((), T)
    assert verdict.tally == Tally(positions=T, hairs=2)


def test_after_a_flip_no_position_is_judged_value_by_value() -> None:
    made = _Made()
    _flip(made.logits, 10)
    verdict = made.forward()
    assert (verdict.problems, verdict.judged) == ((), 10)
    assert (verdict.tally.flips, verdict.tally.moved) == (1, 1)
    assert verdict.rms < 2e-4


def test_what_no_hair_explains_is_wrong() -> None:
    made = _Made()
    _flip(made.logits, 9)
    assert "from position 9 on" in made.forward().problems[0]
    made = _Made()
    _flip(made.logits, 10)
    _flip(made.logits, 3, carried=0.0)
    assert "from position 3 on" in made.forward().problems[0]


def test_a_flip_moves_all_logits_and_no_gap_far() -> None:
    made = _Made()
    made.logits[4, 7] += 2e-3
    assert "float32 arithmetic" in made.forward().problems[0]
    made = _Made()
    made.exact["forward/a/router_gap"][10] = 0.01  # the set knows of no hair there
    _flip(made.logits, 10)
    assert "no hair explains it" in made.forward().problems[0]


def test_flips_of_the_original_are_no_fault_of_ours() -> None:
    made = _Made()
    _flip(made.reference["forward/a/logits"], 10, carried=0.3)
    made.choose_others(10)
    verdict = made.forward()
    assert (verdict.problems, verdict.judged, verdict.tally.original) == ((), T, T - 10)
    _flip(made.reference["forward/a/logits"], 5)
    assert made.forward().problems[0].startswith("the original's logits are away from position 5 on")


def test_other_experts_than_the_original_are_wrong_where_no_hair_decides() -> None:
    made = _Made()
    made.choose_others(10)
    assert made.forward().problems == ()
    made.choose_others(12)
    assert made.forward().problems == ("layer 1 chooses other experts than the original at position 12",)


def test_places_may_be_apart_only_after_a_hair() -> None:
    made = _Made()
    tokens = made.reference["run/a/tokens"]
    assert made.run(tokens).problems == ()
    _flip(made.drawn, 4, carried=0.3)
    verdict = made.run(tokens)
    assert (verdict.problems, verdict.judged, verdict.tally) == ((), 4, Tally(places=N, apart=6))
    made.gaps[:] = 1.0
    assert "no hair explains it" in made.run(tokens).problems[0]


def test_greedy_tokens_may_differ_only_where_a_flip_moved_the_logits() -> None:
    made = _Made()
    tokens = made.reference["run/a/tokens"].copy()
    made.drawn[6] = -made.drawn[6]
    tokens[6] = made.drawn[6].argmax()
    assert made.run(tokens).problems == ()
    tokens[2] += 1
    assert made.run(tokens).problems == ("greedy tokens differ from token 2 on",)


@pytest.mark.parametrize(
    ("tally", "problem"),
    [
        (Tally(positions=90, hairs=9, flips=4, moved=30, places=50, apart=10), None),
        (Tally(positions=90, hairs=9, flips=5), "5 flips; at most 4"),
        (Tally(positions=90, moved=31), "31 moved; at most 30"),
        (Tally(positions=90, places=50, apart=11), "11 apart; at most 10"),
        (Tally(positions=90, original=30, places=50, apart=35), None),
    ],
)
def test_flips_are_bounded(tally: Tally, problem: str | None) -> None:
    verdicts = [Verdict("a", 0, 0.0, 0.0, 1.0, None, (), t) for t in (tally, Tally())]
    assert judge_flips(verdicts).problems == ((problem,) if problem else ())


def test_of_all_experts_none_is_chosen_by_a_hair() -> None:
    made = _Made()
    assert np.isinf(router_gaps(made.probabilities, E)).all()
    assert BFLOAT16.hair > NATIVE.hair > router_gaps(made.probabilities, 2).min()


@pytest.mark.parametrize(("mesh", "hosts"), [("2by2", 1), ("1x1", 2), ("0x1", 1)])
def test_an_impossible_mesh_is_refused(mesh: str, hosts: int, capfd: pytest.CaptureFixture[str]) -> None:
    assert _verify(NANO, NANO, mesh, hosts) == 2
    assert "--mesh" in capfd.readouterr().err


def test_no_golden_set_is_refused(tmp_path: pathlib.Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert _verify(NANO, tmp_path) == 2
    assert "no golden set" in capfd.readouterr().err
