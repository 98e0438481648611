"""Logs of every process: JSON, one object a line; on a terminal, plain text."""

from __future__ import annotations

import contextlib
import datetime
import fcntl
import json
import logging
import os
import pathlib
import shutil
import stat
import sys
from typing import Any

#: On every line, null where it does not apply.
FIELDS = ("request_id", "replica", "epoch", "rank")

_STANDARD = frozenset(logging.makeLogRecord({}).__dict__) | {"message", "asctime", "taskName"}


class JsonFormatter(logging.Formatter):
    """A record as a JSON object: time (UTC), level, logger, message, FIELDS, what `extra` adds, and an error's trace."""

    def __init__(self, **context: Any) -> None:
        super().__init__()
        self._context = context

    def format(self, record: logging.LogRecord) -> str:
        time = datetime.datetime.fromtimestamp(record.created, datetime.UTC)
        line: dict[str, Any] = {
            "time": time.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **dict.fromkeys(FIELDS),
            **self._context,
            **{k: v for k, v in record.__dict__.items() if k not in _STANDARD and not k.startswith("_")},
        }
        if record.exc_info:
            line["error"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def keep_small(descriptor: int, most: int) -> None:
    """If a process writes its log to a file of more than `most` bytes, moves what is there to `FILE.1` and begins again. Only
    with a file that was opened to be appended to, as other writers go on. Raises OSError."""
    found = os.fstat(descriptor)
    if not stat.S_ISREG(found.st_mode) or found.st_size <= most:
        return
    if (
        not fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_APPEND
    ):  # what is written next would not be where the file begins
        return
    path = pathlib.Path(f"/proc/self/fd/{descriptor}").readlink()
    with contextlib.suppress(OSError):  # on a full disk it is lost, which frees the disk
        shutil.copyfile(path, path.with_name(f"{path.name}.1"))
    os.ftruncate(descriptor, 0)


def path() -> str:
    """The file to which this process logs; empty if it is none."""
    with contextlib.suppress(OSError):
        return str(pathlib.Path("/proc/self/fd/2").readlink()) if stat.S_ISREG(os.fstat(2).st_mode) else ""
    return ""


def configure(**context: Any) -> None:
    """Sends this process's logs from level INFO to standard error, every line with `context`. May be called again."""
    handler = logging.StreamHandler(sys.stderr)
    terminal = sys.stderr.isatty()
    handler.setFormatter(logging.Formatter("%(message)s") if terminal else JsonFormatter(**context))
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
    for library in ("jax", "aiohttp.access", "absl"):
        logging.getLogger(library).setLevel(logging.WARNING)
