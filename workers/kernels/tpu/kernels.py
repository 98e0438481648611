"""The hot operations on TPUs."""

from __future__ import annotations

import dataclasses
import functools

from workers.kernels.interface import ACCELERATOR, Kernels
from workers.kernels.sampling import sample_in_turns
from workers.kernels.tpu import attention, experts, matmul
from workers.kernels.tpu.matmul import Target


def tpu_kernels(target: Target) -> Kernels:
    """Those made for a target."""
    return dataclasses.replace(
        ACCELERATOR,
        name="tpu" if target.widens else "tpu-v4",
        project=functools.partial(matmul.project, target=target),
        experts=functools.partial(experts.experts, target=target),
        attend=functools.partial(attention.attend, interpret=target.interpret),
        sample=sample_in_turns,
        heads_first=True,
    )


TPU = tpu_kernels(Target())
_V4 = tpu_kernels(Target(widens=False))


def kernels_for(kind: str) -> Kernels:
    """Those for a kind of TPU, as JAX names it."""
    return _V4 if kind == "TPU v4" else TPU
