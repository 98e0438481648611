"""A process that removes a host's weights cache some time after Ray has ended there, as `ray down` ends it.

Otherwise its memory would be taken until the host itself starts again.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import logging
import os
import pathlib
import socket
import subprocess
import sys
import time

from workers.checkpoint.folder_locks import remove_unused

_LOG = logging.getLogger(__name__)

#: Seconds without Ray after which a cache is removed: `ray up` may only bring another version.
KEEP_SECONDS = 600.0
#: The name of the process that each of Ray's nodes has.
RAY_NODE = "raylet"


def start_keeper(directory: str) -> None:
    """Starts the keeper of a cache, unless there is one. It outlives this process, and Ray's node, for which it looks."""
    module = [sys.executable, "-P", "-m", __name__, directory, str(KEEP_SECONDS), RAY_NODE]
    try:  # Ray ends the children of its workers, but not what has another parent.
        subprocess.run(
            ["setsid", "--fork", *module], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL, cwd="/", check=True,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError) as error:
        _LOG.warning("%s will be kept when Ray has ended here: %s", directory, error)


def keep(directory: pathlib.Path, seconds: float, node: str) -> None:
    """Removes what no process uses, once no process called `node` has been there for so many seconds."""
    pause = min(5.0, seconds / 4)
    left = seconds
    while left > 0:
        time.sleep(pause)
        left = seconds if _runs(node) else left - pause
    with contextlib.suppress(OSError):
        for model in directory.iterdir():
            remove_unused(model)
        directory.rmdir()


def _runs(name: str) -> bool:
    """Whether this user has a process of a name."""
    for process in pathlib.Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it may have ended
            if (process / "comm").read_text().strip() == name and process.stat().st_uid == os.geteuid():
                return True
    return False


def main() -> None:
    """Arguments: the directory, seconds, and what Ray's node is called."""
    directory, seconds, node = sys.argv[1:]
    only = socket.socket(socket.AF_UNIX)
    try:  # one is enough, whatever number of workers starts it
        only.bind(f"\0grokmesh-cache-keeper-{os.geteuid()}-{hashlib.sha256(directory.encode()).hexdigest()[:24]}")
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            return
        raise
    keep(pathlib.Path(directory), float(seconds), node)


if __name__ == "__main__":
    main()
