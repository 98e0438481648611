"""The hot operations on NVIDIA GPUs."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

from workers.kernels.gpu import attention, experts, matmul, rows
from workers.kernels.interface import ACCELERATOR, Kernels


def gpu_kernels(interpret: bool = False) -> Kernels:
    """The kernels; interpreted ones compute without a GPU, for tests."""
    operations: dict[str, Callable[..., Any]] = {
        "norm": rows.norm,
        "route": rows.route,
        "project": matmul.project,
        "experts": experts.experts,
        "logits": matmul.logits,
        "attend": attention.attend,
    }
    bound: dict[str, Any] = {
        name: functools.partial(operation, interpret=interpret) for name, operation in operations.items()
    }
    return dataclasses.replace(ACCELERATOR, name="gpu", scatters=True, heads_first=True, **bound)


GPU = gpu_kernels()
