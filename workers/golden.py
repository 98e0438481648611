"""Golden sets: what xAI's original code answered on a small checkpoint, and how an implementation is judged by it.

A set is a directory with `cases.json` (what was run), `ref-1x1.npz` (what the original answered, in bfloat16) and `exact.npz`
(the same in float32 arithmetic). A position is judged where no expert was chosen by a hair, as bfloat16 may flip those.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]

#: Positions whose router logits of second and third expert are further apart than this are judged.
JUDGED_GAP = 0.1
#: Below this gap even float32 may choose another expert than float32 summed in another order.
EXACT_GAP = 1e-3
#: Greedy tokens are judged where the original's choice was at least so far ahead of the next one.
JUDGED_MARGIN = 1.0
#: Bounds for logits against `exact`: times the original's own rms error, plus an allowance.
RMS_FACTOR, RMS_ALLOWANCE = 1.5, 1e-3
#: Bounds for float32 activations, in standard deviations of the logits.
FLOAT32_MAX = 1e-3
#: Bounds for the original's largest logits, in standard deviations: of the median error where no earlier flip shows, and
#: of the largest error at such a place.
CALM, OUTLYING = 0.02, 0.2
#: How far one of the original's logits may lie from float32 arithmetic, in its own rms errors.
OUTLIER = 12.0


class GoldenError(ValueError):
    """A golden set that can't be read."""


@dataclasses.dataclass(frozen=True)
class GoldenSet:
    """A golden set in memory. `exact` and `reference` map names such as `forward/NAME/logits` to arrays."""

    directory: pathlib.Path
    forward: tuple[Mapping[str, Any], ...]
    run: tuple[Mapping[str, Any], ...]
    exact: Mapping[str, Array]
    reference: Mapping[str, Array]
    manifest: tuple[Mapping[str, Any], ...]

    @classmethod
    def load(cls, directory: pathlib.Path) -> GoldenSet:
        """Reads a set. Raises GoldenError when a file is missing or not what it should be."""
        try:
            cases = json.loads((directory / "cases.json").read_text())
            arrays: list[dict[str, Array]] = []
            for name in ("exact.npz", "ref-1x1.npz"):
                with np.load(directory / name, allow_pickle=False) as file:
                    arrays.append({key: file[key] for key in file.files})
            manifest_path = directory / "manifest.json"
            manifest = json.loads(manifest_path.read_text()) if manifest_path.exists() else []
            exact, reference = arrays
            return cls(directory, tuple(cases["forward"]), tuple(cases["run"]), exact, reference, tuple(manifest))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise GoldenError(f"{directory}: no golden set: {error!r}") from error

    def array(self, source: Mapping[str, Array], name: str) -> Array:
        """An array of the set. Raises GoldenError when it is missing."""
        if name not in source:
            raise GoldenError(f"{self.directory}: {name} is missing")
        return source[name]


@dataclasses.dataclass(frozen=True)
class Verdict:
    """How one case came out.

    Attributes:
      case: its name.
      judged: how many positions or tokens were judged.
      rms, worst: error of the logits, over judged positions.
      argmax: share of all positions where the largest logit is the same.
      tokens: share of equal greedy tokens, None where none were drawn.
      problems: what is out of tolerance; empty for a pass.
    """

    case: str
    judged: int
    rms: float
    worst: float
    argmax: float
    tokens: float | None
    problems: tuple[str, ...]


def judge_forward(golden: GoldenSet, case: Mapping[str, Any], logits: Array, gaps: Array, float32: bool) -> Verdict:
    """Judges the logits [T, V] of a prompt.

    Against `exact` the rms error must be at most 1.5 times the original's own (+ 1e-3) and, with float32 activations, every
    single value must agree; against the original no value may lie beyond what its rounding explains. `gaps` [T] are the
    router gaps found, which must be those of the set.
    """
    name = f"forward/{case['name']}"
    exact = golden.array(golden.exact, f"{name}/logits")
    expected_gaps = golden.array(golden.exact, f"{name}/router_gap")
    reference = golden.array(golden.reference, f"{name}/logits")
    judged = expected_gaps > JUDGED_GAP
    problems = []
    error, noise = logits - exact, reference - exact
    rms, own = _rms(error[judged]), _rms(noise[judged])
    limit = RMS_FACTOR * own + RMS_ALLOWANCE
    if not rms <= limit:
        problems.append(f"rms error {rms:.2g} exceeds {limit:.2g}")
    if float32:
        bound = FLOAT32_MAX * float(exact.std())
        worst = np.abs(error[expected_gaps > EXACT_GAP]).max(initial=0.0)
        if not worst <= bound:
            problems.append(f"a logit is {worst:.2g} from float32 arithmetic; at most {bound:.2g}")
        drift = np.abs(gaps - expected_gaps).max(initial=0.0)
        if not drift <= bound:
            problems.append(f"a router gap is {drift:.2g} from the set's; at most {bound:.2g}")
    outlier = np.abs(logits - reference)[judged].max(initial=0.0)
    if not outlier <= OUTLIER * max(own, rms) + RMS_ALLOWANCE:
        problems.append(f"a logit of the original is {outlier:.2g} away; its rms error is {own:.2g}")
    argmax = float((logits.argmax(-1) == exact.argmax(-1)).mean())
    worst_judged = float(np.abs(error[judged]).max(initial=0.0))
    return Verdict(case["name"], int(judged.sum()), rms, worst_judged, argmax, None, tuple(problems))


def judge_run(
    golden: GoldenSet, case: Mapping[str, Any], tokens: list[int] | None, logits: Array, gaps: Array
) -> Verdict:
    """Judges a generation.

    Args:
      golden: the set.
      case: the case, of kind greedy or sample.
      tokens: greedy tokens, or None for a sampled case: the original's random numbers are its own.
      logits: [n, V], ours at the places where the original drew its tokens, given all its earlier ones.
      gaps: [n] router gaps there.

    Greedy tokens must be equal where the original's choices were clear, and be those of its own largest logits. Its eight
    largest logits at each judged place must be ours within its rounding, but for places where an expert that it flipped
    earlier moves all of them.
    """
    name = f"run/{case['name']}"
    expected = golden.array(golden.reference, f"{name}/tokens")
    ids = golden.array(golden.reference, f"{name}/logit_ids")
    values = golden.array(golden.reference, f"{name}/logit_vals")
    judged = gaps > JUDGED_GAP
    error = np.take_along_axis(logits, ids, axis=-1) - values  # [n, 8]
    rms = _rms(error[judged])
    worst = float(np.abs(error[judged]).max(initial=0.0))
    spread = float(logits.std())
    problems = []
    calm = judged & (np.median(np.abs(error), axis=-1) <= CALM * spread)
    if not calm.sum() >= 0.2 * judged.sum():  # after a flip most later places may be moved
        problems.append(
            f"the original's largest logits are away at {judged.sum() - calm.sum()} of {judged.sum()} places"
        )
    outlier = float(np.abs(error[calm]).max(initial=0.0))
    if not outlier <= OUTLYING * spread:
        problems.append(f"one of the original's largest logits is {outlier:.2g} away; at most {OUTLYING * spread:.2g}")
    agreement = None
    if tokens is not None:
        equal = np.array(tokens) == expected
        agreement = float(equal.mean())
        if case.get("min_margin_exact", 0.0) > JUDGED_MARGIN and agreement < 1:
            problems.append(f"greedy tokens differ from token {int(np.argmin(equal))} on")
        own = expected == ids[:, 0]
        if not own.all():
            problems.append(f"the original's token {int(np.argmin(own))} is not that of its largest logit")
    argmax = float((logits.argmax(-1) == ids[:, 0]).mean())
    return Verdict(case["name"], int(judged.sum()), rms, worst, argmax, agreement, tuple(problems))


def judge_checkpoint(golden: GoldenSet, checkpoint: pathlib.Path) -> Verdict | None:
    """Compares the checkpoint's files with the set's checksums; None if the set has none."""
    if not golden.manifest:
        return None
    problems = []
    for entry in golden.manifest:
        path = checkpoint / "ckpt-0" / f"tensor{entry['i']:05d}_000"
        with path.open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != entry["sha256"]:
                problems.append(f"{path.name} ({entry['path']}) is not the set's")
    return Verdict("checksums", len(golden.manifest), 0.0, 0.0, 1.0, None, tuple(problems))


def _rms(values: Array) -> float:
    return float(np.sqrt(np.mean(np.square(values)))) if values.size else 0.0
