"""Checkpoints of any size that take no room."""

from __future__ import annotations

import dataclasses
import json
import pathlib

from tools.aot.release import release_headers
from tools.checkpoint_writer import Hole, write_array, write_quantized
from workers.model.config import GrokConfig


def write_sparse_checkpoint(directory: pathlib.Path, config: GrokConfig) -> None:
    """Writes a checkpoint in xAI's layout whose large values are holes."""
    (directory / "ckpt-0").mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(dataclasses.asdict(config)))
    for _, file in release_headers(config).tensors:
        path = directory / "ckpt-0" / file.path.name
        values = Hole(file.values.shape, file.values.dtype)
        if file.scales is None:
            write_array(path, values)
        else:
            write_quantized(path, values, Hole(file.scales.shape, file.scales.dtype))
