"""The hot operations on TPUs."""

from __future__ import annotations

import dataclasses
import functools

from workers.kernels.interface import ACCELERATOR, Kernels
from workers.kernels.sampling import sample_in_turns
from workers.kernels.tpu import attention, experts, matmul


def tpu_kernels(interpret: bool = False) -> Kernels:
    """The kernels; interpreted ones compute without a TPU, for tests."""
    return dataclasses.replace(
        ACCELERATOR,
        name="tpu",
        project=functools.partial(matmul.project, interpret=interpret),
        experts=functools.partial(experts.experts, interpret=interpret),
        attend=functools.partial(attention.attend, interpret=interpret),
        sample=sample_in_turns,
        heads_first=True,
    )


TPU = tpu_kernels()
