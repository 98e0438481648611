"""A record of an epoch, for developers: what was planned and what came of it. `tools/replay.py` computes it again."""

from __future__ import annotations

import dataclasses
import os
import pathlib
from collections.abc import Iterator
from typing import BinaryIO

from workers.host.streams import LENGTH
from workers.messages.codec import decode, encode
from workers.messages.plan import Plan, StepTokens
from workers.messages.specs import EngineSpec, MeshSpec, ModelSpec


@dataclasses.dataclass(frozen=True)
class LoggedEngine:
    """The engine that carried the plans out. `kernels` is the name of those that it computed with."""

    model: ModelSpec
    mesh: MeshSpec
    engine: EngineSpec
    kernels: str


@dataclasses.dataclass(frozen=True)
class Entry:
    """One of the three. The engine comes first; a plan's tokens come some plans later."""

    engine: LoggedEngine | None = None
    plan: Plan | None = None
    tokens: StepTokens | None = None


class PlanLog:
    """Writes a log. It holds prompts and completions as tokens, so only the process's own user can read it."""

    def __init__(self, path: pathlib.Path, engine: LoggedEngine) -> None:
        """Raises OSError."""
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        self._file = os.fdopen(descriptor, "wb")
        self._write(Entry(engine=engine))

    def plan(self, plan: Plan) -> None:
        self._write(Entry(plan=plan))

    def tokens(self, tokens: StepTokens) -> None:
        self._write(Entry(tokens=tokens))

    def _write(self, entry: Entry) -> None:
        data = encode(entry)
        self._file.write(LENGTH.pack(len(data)) + data)
        self._file.flush()  # the last plan is the one that matters when a mesh hangs


def read_log(file: BinaryIO) -> Iterator[Entry]:
    """The entries of a log, without what was cut off at its end. Raises CodecError."""
    while len(header := file.read(LENGTH.size)) == LENGTH.size:
        (length,) = LENGTH.unpack(header)
        data = file.read(length)
        if len(data) < length:
            return
        yield decode(Entry, data)
