"""The hot operations on TPUs."""

from __future__ import annotations

import dataclasses
import functools

from workers.kernels import portable, tpu_attention, tpu_matmul
from workers.kernels.kernels import PORTABLE

TPU = dataclasses.replace(
    PORTABLE,
    name="tpu",
    project=tpu_matmul.project,
    experts=functools.partial(portable.experts, multiply=tpu_matmul.grouped_matmul),
    attend=tpu_attention.attend,
    stacked=True,
    heads_first=True,
)
