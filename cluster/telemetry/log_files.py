"""The logs of processes as files: kept small, and followed by others."""

from __future__ import annotations

import asyncio
import contextlib
import pathlib
import sys
from collections.abc import Iterable
from typing import TextIO

from workers.telemetry import logs

#: Bytes of a log after which it begins anew, the last one kept beside it, and seconds between looks.
MOST_LOG_BYTES, LOG_SECONDS = 64 * 1024 * 1024, 30.0


async def keep_log_small() -> None:
    """Keeps the file to which this process logs, if it is one, from growing without end."""
    while True:
        with contextlib.suppress(OSError, ValueError, AttributeError):  # that it can't is no reason to stop
            await asyncio.to_thread(logs.keep_small, sys.stderr.fileno(), MOST_LOG_BYTES)
        await asyncio.sleep(LOG_SECONDS)


class LogFollower:
    """Copies the lines that other processes of this project add to their logs. Ray writes its own there too."""

    def __init__(self, output: TextIO) -> None:
        self._output = output
        #: How far each file was read.
        self._read: dict[str, int] = {}

    def skip(self, paths: Iterable[str]) -> None:
        """Of these files only what is added from now on is copied."""
        for path in paths:
            with contextlib.suppress(OSError):
                self._read[path] = pathlib.Path(path).stat().st_size

    def follow(self, paths: Iterable[str]) -> None:
        """Copies these files, from where they were read to, from now on."""
        for path in paths:
            self._read.setdefault(path, 0)

    def look(self) -> None:
        """Copies the whole lines that have been added."""
        for path, read in self._read.items():
            with contextlib.suppress(OSError), pathlib.Path(path).open("rb") as log:
                if log.seek(0, 2) < read:  # it has begun anew
                    read = 0
                log.seek(read)
                added = log.read()
                whole = added[: added.rfind(b"\n") + 1]
                self._read[path] = read + len(whole)
                lines = whole.decode(errors="replace").splitlines(keepends=True)
                self._output.write("".join(line for line in lines if line.startswith("{")))
        self._output.flush()
