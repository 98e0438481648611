"""Programs compiled for TPUs and GPUs: little memory beside their arguments, no copies of weights, small sums.

They need the compilers that `make aot` installs, and are skipped elsewhere.
"""

from __future__ import annotations

import dataclasses

import pytest

from tools.aot.report import Engine, NoCompilerError, compile_in_subprocess
from workers.capacity.hardware import Hardware, gpu_hosts, tpu_slice
from workers.capacity.memory import Precision
from workers.model.config import GrokConfig

#: Grok-1's layers, but only three.
CONFIG = dataclasses.replace(GrokConfig(), num_layers=3)


@pytest.mark.parametrize("slots", [8, 32])
@pytest.mark.parametrize(
    ("hardware", "mesh", "limit"),
    [
        (tpu_slice("v6e:4x4"), (2, 8, "batch"), 64 << 20),
        (tpu_slice("v4:2x2x4"), (2, 8, "batch"), 64 << 20),
        (gpu_hosts("8xH100", 1), (1, 8, "tensor"), 256 << 20),
    ],
    ids=str,
)
def test_a_decode_step_needs_little_beside_its_arguments(
    hardware: Hardware, mesh: tuple[int, int, str], limit: int, slots: int
) -> None:
    pages = slots // (mesh[0] if mesh[2] == "batch" else 1) * 128 + 1
    try:
        told = compile_in_subprocess(CONFIG, hardware, mesh, Precision(), "decode", Engine(slots, pages, 64, 512, 8192))
    except NoCompilerError as error:
        pytest.skip(str(error))
    assert told.fits, told.problem
    assert told.temporaries <= limit
    assert max(traffic.largest for traffic in told.collectives.values()) <= 8e6
    assert told.weight_copies == {}
