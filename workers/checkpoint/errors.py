"""What is wrong with a checkpoint."""

from __future__ import annotations

import pathlib


class CheckpointError(ValueError):
    """A checkpoint that can't be read, with the file, the tensor and the byte offset where that showed."""

    def __init__(
        self, path: pathlib.Path, problem: str, *, tensor: str | None = None, offset: int | None = None
    ) -> None:
        where = f"{path}" + (f" ({tensor})" if tensor else "") + (f" at byte {offset}" if offset is not None else "")
        super().__init__(f"{where}: {problem}")
        self.path = path
        self.tensor = tensor
        self.offset = offset
        self.problem = problem
