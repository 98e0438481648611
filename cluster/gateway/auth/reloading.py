"""Files that are read again when they change."""

from __future__ import annotations

import logging
import pathlib
import time
from collections.abc import Callable
from typing import Generic, TypeVar

_LOG = logging.getLogger(__name__)

#: Seconds between looks whether files have changed.
LOOK_SECONDS = 1.0

Content = TypeVar("Content")


class Reloading(Generic[Content]):
    """What files say. When they have changed to something that can't be used, what they said before goes on to count."""

    def __init__(self, files: tuple[pathlib.Path, ...], read: Callable[[], Content], wrong: type[ValueError]) -> None:
        """Reads them. Raises `wrong`, as `read` does for files that can't be used."""
        self._files = files
        self._read = read
        self._wrong = wrong
        self._stamps = self._stamp()
        self._content = read()
        self._looked = time.monotonic()

    def get(self) -> Content:
        """What the files said a second ago at the most."""
        now = time.monotonic()
        if now - self._looked >= LOOK_SECONDS:
            self._looked = now
            stamps = self._stamp()
            if stamps != self._stamps:
                self._stamps = stamps
                self._renew()
        return self._content

    def _renew(self) -> None:
        try:
            self._content = self._read()
            _LOG.info("%s: read again", self._files[0])
        except self._wrong as error:
            _LOG.error("%s; what was read before goes on to count", error)

    def _stamp(self) -> tuple[tuple[int, int] | None, ...]:
        return tuple(_stamp(file) for file in self._files)


def _stamp(file: pathlib.Path) -> tuple[int, int] | None:
    """Changes when a file does."""
    try:
        found = file.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_ino
