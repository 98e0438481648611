"""What fuzzing found before, and some random inputs besides. `make fuzz` tries millions."""

from __future__ import annotations

import random

import pytest

from tests.fuzz.targets import TARGETS, seeds

MUTANTS = 300


def _mutant(rng: random.Random, seed: bytes) -> bytes:
    """A seed with some bytes changed, doubled, left out or cut off."""
    data = bytearray(seed)
    for _ in range(rng.randint(1, 6)):
        at = rng.randrange(len(data) + 1)
        kind = rng.randrange(4)
        if kind == 0 and at < len(data):
            data[at] = rng.randrange(256)
        elif kind == 1:
            data[at:at] = bytes(rng.randrange(256) for _ in range(rng.randint(1, 8)))
        elif kind == 2:
            del data[at : at + rng.randint(1, 8)]
        else:
            data += data[at : at + 64]
    return bytes(data)


@pytest.mark.parametrize("target", TARGETS)
def test_nothing_but_the_promised_errors(target: str) -> None:
    rng = random.Random(0)
    known = list(seeds(target))
    for seed in known:
        TARGETS[target](seed)
    for _ in range(MUTANTS):
        TARGETS[target](_mutant(rng, rng.choice(known)))
