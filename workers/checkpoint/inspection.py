"""A checkpoint described for a reader."""

from __future__ import annotations

import dataclasses

from workers.checkpoint.checkpoint import open_checkpoint
from workers.checkpoint.storage import Location


def describe(directory: Location) -> str:
    """All tensors of a checkpoint with shapes, types, scale groups and sizes; parameters; the configuration.

    Raises CheckpointError or ConfigError.
    """
    checkpoint = open_checkpoint(directory)
    width = max(len(info.path) for info, _ in checkpoint.tensors)
    lines = [f"{'file':<17} {'tensor':<{width}} {'type':<9} {'shape':<18} {'groups':>6} {'bytes':>15}"]
    for info, file in checkpoint.tensors:
        shape = "x".join(map(str, file.values.shape))
        groups = str(file.scales.shape[-2]) if file.scales else "-"
        nbytes = file.values.nbytes + (file.scales.nbytes if file.scales else 0)
        lines.append(
            f"{file.path.name:<17} {info.path:<{width}} {file.values.dtype.name:<9} {shape:<18} {groups:>6} {nbytes:>15,}"
        )
    parameters = sum(info.size for info, _ in checkpoint.tensors)
    source = "inferred from the tensors, multipliers of Grok-1" if checkpoint.inferred else "from config.json"
    lines += ["", f"{len(checkpoint.tensors)} tensors, {parameters:,} parameters, {checkpoint.nbytes:,} bytes"]
    lines += [f"configuration ({source}):"]
    lines += [f"  {name}: {value}" for name, value in dataclasses.asdict(checkpoint.config).items()]
    return "\n".join(lines)
