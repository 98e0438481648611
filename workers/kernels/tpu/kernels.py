"""The hot operations on TPUs."""

from __future__ import annotations

import dataclasses
import functools

from workers.kernels.interface import ACCELERATOR
from workers.kernels.tpu import attention, matmul
from workers.kernels.xla import portable

TPU = dataclasses.replace(
    ACCELERATOR,
    name="tpu",
    project=matmul.project,
    experts=functools.partial(portable.experts, multiply=matmul.grouped_matmul),
    attend=attention.attend,
    heads_first=True,
)
