"""The hot operations on NVIDIA GPUs."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

from workers.kernels.gpu import attention, experts, matmul, rows, tiles
from workers.kernels.interface import ACCELERATOR, Kernels
from workers.kernels.kv_pages import Pages


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
    return dataclasses.replace(
        ACCELERATOR,
        name="gpu",
        batch_invariant=True,
        covers=covers,
        paired=True,
        scatters=True,
        heads_first=True,
        **bound,
    )


def covers(params: Mapping[str, Mapping[str, Any]], pages: Pages) -> bool:
    """Whether everything has whole tiles, so that nothing is left to plain XLA. Shapes are those of one device's parts."""

    def fits(module: str, name: str, array: Any) -> bool:
        if name == "embeddings":
            return matmul.fits_table(array)
        if module.endswith("router"):
            return rows.fits_router(*array.shape[1:])
        if name != "w":
            return True
        return tiles.fits(array)

    each = (fits(module, name, array) for module, own in params.items() for name, array in own.items())
    return attention.fits_pages(pages) and all(each)


GPU = gpu_kernels()
