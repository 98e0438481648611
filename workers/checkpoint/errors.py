"""What is wrong with a checkpoint."""

from __future__ import annotations


class CheckpointError(ValueError):
    """A checkpoint that can't be read, with the file, the tensor and the byte offset where that showed."""

    def __init__(self, path: object, problem: str, *, tensor: str | None = None, offset: int | None = None) -> None:
        where = f"{path}" + (f" ({tensor})" if tensor else "") + (f" at byte {offset}" if offset is not None else "")
        super().__init__(f"{where}: {problem}")
        self._arguments = (path, problem, tensor, offset)

    def __reduce__(self) -> tuple[object, tuple[object, str, str | None, int | None]]:
        """Lets Ray carry the error from a worker to the controller."""
        return _again, self._arguments


def _again(path: object, problem: str, tensor: str | None, offset: int | None) -> CheckpointError:
    return CheckpointError(path, problem, tensor=tensor, offset=offset)
