"""The hot operations on TPUs."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

from workers.kernels.interface import ACCELERATOR, Kernels
from workers.kernels.tpu import attention, experts, matmul


def tpu_kernels(interpret: bool = False) -> Kernels:
    """The kernels; interpreted ones compute without a TPU, for tests."""
    operations: dict[str, Callable[..., Any]] = {
        "project": matmul.project,
        "experts": experts.experts,
        "attend": attention.attend,
    }
    bound: dict[str, Any] = {
        name: functools.partial(operation, interpret=interpret) for name, operation in operations.items()
    }
    return dataclasses.replace(ACCELERATOR, name="tpu", heads_first=True, **bound)


TPU = tpu_kernels()
