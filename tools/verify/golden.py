"""Golden sets: what xAI's original code answered on a small checkpoint, and how an implementation is judged by it.

A set is a directory with `cases.json` (what was run), `ref-1x1.npz` (what the original answered, in bfloat16) and `exact.npz`
(the same in float32 arithmetic).

Where the second and third expert are a hair apart, rounding decides between them: a flip. It is no error, but it moves all
logits of its position, and through attention those of later ones. Of each case the positions up to the first flip are judged
value by value. The first position that moved must be one that a hair decides; what moves before any hair is wrong. Over all
cases flips, and positions that they moved, are counted and bounded.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]


@dataclasses.dataclass(frozen=True)
class Rounding:
    """What a type of activations may do to what float32 arithmetic gives.

    Attributes:
      hair: how far it may move a router gap, the distance between the router logits of the last chosen and the first
        rejected expert.
      rms: error of a position's logits, in standard deviations of the logits. A position beyond it has moved. A flip moves it
        further by far.
      worst: error of a single logit, in standard deviations. One logit alone is never moved by a flip.
    """

    hair: float
    rms: float
    worst: float


#: Plain float32.
FLOAT32 = Rounding(hair=5e-5, rms=1e-5, worst=5e-5)
#: The native kernels, which multiply float32 activations as integers.
NATIVE = Rounding(hair=2e-3, rms=4e-4, worst=1.3e-3)
#: Also that of the original.
BFLOAT16 = Rounding(hair=0.1, rms=0.03, worst=0.2)

#: Greedy tokens are judged where the original's choice was at least so far ahead of the next one.
JUDGED_MARGIN = 1.0
#: Bounds for logits against `exact`: times the original's own rms error, plus an allowance.
RMS_FACTOR, RMS_ALLOWANCE = 1.5, 1e-3
#: How far one of the original's logits may lie from ours, in its own rms errors.
OUTLIER = 20.0
#: Bounds for the original's eight largest logits, in standard deviations: where their median error is larger, the place
#: has moved; elsewhere no single one may be further away than the second.
CALM, OUTLYING = 0.02, 0.3
#: Flips may be so large a share of the places that a hair decides, and one more.
FLIP_SHARE = 1 / 3
#: Positions of prompts that flips moved far may be so large a share of all.
MOVED_SHARE = 1 / 3
#: The same of the places where the original drew tokens: times the original's own share in prompts, and so much more.
PLACE_FACTOR, PLACE_ALLOWANCE = 1.5, 0.2


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
class Tally:
    """Counts of one case, or summed over several.

    Attributes:
      positions: of prompts, compared with `exact`.
      hairs: how many of them a hair decides.
      flips: how many of those moved as far as a flip moves them, or were the first to move.
      moved: positions that moved so far, by their own flip or an earlier one.
      original: positions where the original's logits did.
      places: where the original drew tokens.
      apart: places where ours and the original's logits are apart as after a flip of either.
    """

    positions: int = 0
    hairs: int = 0
    flips: int = 0
    moved: int = 0
    original: int = 0
    places: int = 0
    apart: int = 0

    def __add__(self, other: Tally) -> Tally:
        return Tally(*(a + b for a, b in zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)))


@dataclasses.dataclass(frozen=True)
class Verdict:
    """How one case came out.

    Attributes:
      case: its name.
      judged: how many positions or tokens were judged value by value.
      rms, worst: error of the logits, over judged positions.
      argmax: share of all positions where the largest logit is the same.
      tokens: share of equal greedy tokens, None where none were drawn.
      problems: what is out of tolerance; empty for a pass.
      tally: what to add up over all cases.
    """

    case: str
    judged: int
    rms: float
    worst: float
    argmax: float
    tokens: float | None
    problems: tuple[str, ...]
    tally: Tally = Tally()


def router_gaps(probabilities: Array, selected: int) -> Array:
    """Of router probabilities [..., E] the gap [...] between the logits of the last chosen and the first rejected expert."""
    if selected >= probabilities.shape[-1]:
        return np.full(probabilities.shape[:-1], np.inf)
    ordered = np.sort(np.maximum(probabilities, np.finfo(np.float32).tiny), axis=-1)[..., ::-1]
    gaps: Array = np.log(ordered[..., selected - 1]) - np.log(ordered[..., selected])
    return gaps


def original_noise(golden: GoldenSet) -> float:
    """The original's own rms error against `exact`, over all positions that none of its flips can have moved."""
    errors = []
    for case in golden.forward:
        error, steady = _original(golden, case)
        errors.append(error[steady].reshape(-1))
    return _rms(np.concatenate(errors)) if errors else 0.0


def judge_forward(
    golden: GoldenSet, case: Mapping[str, Any], logits: Array, probabilities: Array, selected: int, rounding: Rounding
) -> Verdict:
    """Judges the logits [T, V] of a prompt, for which the routers had the `probabilities` [T, L, E].

    Up to the first flip the rms error against `exact` must be at most 1.5 times the original's own (+ 1e-3), and no value
    and no router gap may be further away than `rounding` explains. Where the original didn't flip either, its logits must be
    ours within its rounding, and its choices of experts, where the set has them, those of ours.
    """
    name = f"forward/{case['name']}"
    exact = golden.array(golden.exact, f"{name}/logits")
    expected_gaps = golden.array(golden.exact, f"{name}/router_gap")
    reference = golden.array(golden.reference, f"{name}/logits")
    gaps = router_gaps(probabilities, selected).min(axis=1)
    error, spread = logits - exact, float(exact.std())
    moved = _rms(error, -1) > rounding.rms * spread
    undecided = gaps + expected_gaps <= rounding.hair  # a flip turns the sign of a gap
    steady = _before_first(moved)
    problems = [] if steady.all() or undecided[steady.sum()] else [_unexplained(error, int(steady.sum()))]
    noise = original_noise(golden)
    rms, worst = _rms(error[steady]), float(np.abs(error[steady]).max(initial=0.0))
    drift = float(np.abs(gaps - expected_gaps)[steady].max(initial=0.0))
    _limit(problems, "the rms error is", rms, RMS_FACTOR * noise + RMS_ALLOWANCE)
    _limit(problems, "a logit's distance from float32 arithmetic is", worst, rounding.worst * spread)
    _limit(problems, "a router gap's distance from the set's is", drift, rounding.hair)
    problems += _judge_original(golden, case, logits, probabilities, selected, steady)
    far = _rms(error, -1) > BFLOAT16.rms * spread
    first = moved & (np.cumsum(moved) == 1)
    tally = Tally(
        positions=len(gaps),
        hairs=int((expected_gaps <= rounding.hair).sum()),
        flips=int((undecided & (far | first)).sum()),
        moved=int(far.sum()),
        original=int((_rms(reference - exact, -1) > BFLOAT16.rms * spread).sum()),
    )
    argmax = float((logits.argmax(-1) == exact.argmax(-1)).mean())
    return Verdict(case["name"], int(steady.sum()), rms, worst, argmax, None, tuple(problems), tally)


def _judge_original(
    golden: GoldenSet, case: Mapping[str, Any], logits: Array, probabilities: Array, selected: int, steady: Array
) -> list[str]:
    """What speaks against the original's logits, and choices of experts, being ours but for its rounding."""
    problems: list[str] = []
    error, still = _original(golden, case)
    gaps = golden.array(golden.exact, f"forward/{case['name']}/router_gap")
    if not still.all() and gaps[still.sum()] > BFLOAT16.hair:
        problems.append("the original's " + _unexplained(error, int(still.sum())))
    reference = golden.array(golden.reference, f"forward/{case['name']}/logits")
    both = steady & still
    distance = np.abs(logits - reference)[both]
    bound = OUTLIER * max(original_noise(golden), _rms(distance)) + RMS_ALLOWANCE
    _limit(problems, "a logit's distance from the original's is", float(distance.max(initial=0.0)), bound)
    traced = golden.reference.get("trace/router_probs")  # [L, T, E], of the only case of its length
    if traced is not None and [len(c["prompt"]) for c in golden.forward].count(traced.shape[1]) == 1:
        theirs = np.moveaxis(traced, 0, 1)
        if theirs.shape == probabilities.shape:
            other = (_chosen(theirs, selected) != _chosen(probabilities, selected)).any(-1)  # [T, L]
            apart = router_gaps(theirs, selected) + router_gaps(probabilities, selected)
            for position, layer in np.argwhere(other & (apart > BFLOAT16.hair) & both[:, None])[:1]:
                problems.append(f"layer {layer} chooses other experts than the original at position {position}")
    return problems


def judge_run(
    golden: GoldenSet, case: Mapping[str, Any], tokens: list[int] | None, logits: Array, gaps: Array
) -> Verdict:
    """Judges a generation.

    Args:
      golden: the set.
      case: the case, of kind greedy or sample.
      tokens: greedy tokens, or None for a sampled case: the original's random numbers are its own.
      logits: [n, V], ours at the places where the original drew its tokens, given all its earlier ones.
      gaps: [T] router gaps of ours at all positions of the prompt and of those tokens; the last n are those of the places.

    The original's eight largest logits must be ours within its rounding, up to the first flip: of the prompt it is not known
    where the original flipped. Greedy tokens must be equal where the original's choices were clear, but for what a flip moved,
    and be those of its own largest logits.
    """
    name = f"run/{case['name']}"
    expected = golden.array(golden.reference, f"{name}/tokens")
    ids = golden.array(golden.reference, f"{name}/logit_ids")
    values = golden.array(golden.reference, f"{name}/logit_vals")
    error = np.take_along_axis(logits, ids, axis=-1) - values  # [n, 8]
    spread = float(logits.std())
    moved = np.median(np.abs(error), axis=-1) > CALM * spread
    steady = _before_first(moved)
    problems: list[str] = []
    before = len(gaps) - len(error) + int(steady.sum())
    if not steady.all() and not (gaps[: before + 1] <= BFLOAT16.hair).any():
        problems.append("of the original's largest logits " + _unexplained(error, int(steady.sum())))
    outlier = float(np.abs(error[~moved]).max(initial=0.0))
    _limit(problems, "the distance of one of the original's largest logits is", outlier, OUTLYING * spread)
    agreement = None
    if tokens is not None:
        equal = np.array(tokens) == expected
        agreement = float(equal.mean())
        first = int(np.argmin(equal))
        flipped = bool(moved[first]) and logits[first].argmax() != expected[first]
        if case.get("min_margin_exact", 0.0) > JUDGED_MARGIN and agreement < 1 and not flipped:
            problems.append(f"greedy tokens differ from token {first} on")
        own = expected == ids[:, 0]
        if not own.all():
            problems.append(f"the original's token {int(np.argmin(own))} is not that of its largest logit")
    argmax = float((logits.argmax(-1) == ids[:, 0]).mean())
    tally = Tally(places=len(error), apart=int(moved.sum()))
    rms, worst = _rms(error[steady]), float(np.abs(error[steady]).max(initial=0.0))
    return Verdict(case["name"], int(steady.sum()), rms, worst, argmax, agreement, tuple(problems), tally)


def flip_bounds(tally: Tally) -> dict[str, tuple[int, int]]:
    """What flips did, each with its bound: flips themselves, positions that they moved far, places that are apart."""
    share = PLACE_FACTOR * tally.original / max(tally.positions, 1) + PLACE_ALLOWANCE
    return {
        "flips": (tally.flips, 1 + int(FLIP_SHARE * tally.hairs)),
        "moved": (tally.moved, int(MOVED_SHARE * tally.positions)),
        "apart": (tally.apart, int(min(share, 1.0) * tally.places)),
    }


def judge_flips(verdicts: Iterable[Verdict]) -> Verdict:
    """Judges how many flips all cases had together: rounding alone makes few, a wrong model flips everywhere."""
    total = sum((v.tally for v in verdicts), Tally())
    problems = [f"{n} {what}; at most {most}" for what, (n, most) in flip_bounds(total).items() if n > most]
    return Verdict("flips", total.hairs, 0.0, 0.0, 1.0, None, tuple(problems), total)


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


def _original(golden: GoldenSet, case: Mapping[str, Any]) -> tuple[Array, Array]:
    """The original's error [T, V] against `exact`, and its positions [T] before any of its flips."""
    name = f"forward/{case['name']}/logits"
    exact = golden.array(golden.exact, name)
    error = golden.array(golden.reference, name) - exact
    return error, _before_first(_rms(error, -1) > BFLOAT16.rms * float(exact.std()))


def _before_first(moved: Array) -> Array:
    before: Array = np.cumsum(moved) == 0
    return before


def _chosen(probabilities: Array, selected: int) -> Array:
    chosen: Array = np.sort(np.argsort(-probabilities, axis=-1, kind="stable")[..., :selected], axis=-1)
    return chosen


def _unexplained(error: Array, position: int) -> str:
    return f"logits are away from position {position} on, there by {_rms(error[position]):.2g}, and no hair explains it"


def _limit(problems: list[str], what: str, value: float, bound: float) -> None:
    if not value <= bound:
        problems.append(f"{what} {value:.2g}; at most {bound:.2g}")


def _rms(values: Array, axis: int | None = None) -> Any:
    return np.sqrt(np.mean(np.square(values), axis=axis)) if values.size else 0.0
