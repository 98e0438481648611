"""The headers of a checkpoint in xAI's layout, of any size, without its bytes."""

from __future__ import annotations

import pathlib

import ml_dtypes
import numpy as np

from workers.checkpoint.checkpoint import Checkpoint
from workers.checkpoint.tensor_file import ArraySpan, TensorFile
from workers.model.config import GrokConfig
from workers.model.parameters import SCALE_GROUPS, parameter_table


def release_headers(config: GrokConfig) -> Checkpoint:
    """A checkpoint of a model, as xAI would have written it: for all that needs types and shapes only."""
    tensors = []
    for i, info in enumerate(parameter_table(config)):
        values = ArraySpan(info.shape, np.dtype(np.int8 if info.quantized else np.float32), 0)
        scales = None
        if info.quantized:
            groups = SCALE_GROUPS if info.grouped else 1
            shape = (*info.shape[:-2], groups, info.shape[-1])
            scales = ArraySpan(shape, np.dtype(ml_dtypes.bfloat16), values.nbytes)
        tensors.append((info, TensorFile(pathlib.Path(f"tensor{i:05d}_000"), values, scales)))
    return Checkpoint(pathlib.Path(), config, False, tuple(tensors))
