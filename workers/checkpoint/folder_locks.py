"""Locks that say which folders of a weights cache a process uses."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pathlib
import shutil

LOCK = "lock"


def locked(path: pathlib.Path, kind: int) -> int:
    """The descriptor of a lock file, locked for as long as it is open. Raises OSError if another process has locked it."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    return descriptor


def remove_unused(folder: pathlib.Path) -> None:
    """Removes a folder whose lock no process holds."""
    with contextlib.suppress(OSError), (folder / LOCK).open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(folder, ignore_errors=True)
