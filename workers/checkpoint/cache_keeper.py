"""A process that removes a host's weights cache some time after Ray has ended there, as `ray down` ends it.

Otherwise its memory would be taken until the host itself starts again.
"""

from __future__ import annotations

import contextlib
import os
import pathlib
import socket
import subprocess
import sys
import time

from workers.checkpoint.folder_locks import remove_unused

#: Seconds without Ray after which a cache is removed: `ray up` may only bring another version.
KEEP_SECONDS = 600.0
_POLL_SECONDS = 1.0


def start_keeper(directory: str, ray_node: int) -> None:
    """Starts the keeper of a cache. It outlives this process, and the one of Ray's node, which it watches."""
    module = [sys.executable, "-m", __name__, directory, str(ray_node), str(KEEP_SECONDS)]
    # Ray ends the children of its workers, but not what has another parent.
    subprocess.run(
        ["setsid", "--fork", *module], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        check=True,
    )  # fmt: skip


def keep(directory: pathlib.Path, ray_node: int, seconds: float) -> None:
    """Removes what no process uses, so many seconds after Ray's node has ended."""
    while pathlib.Path(f"/proc/{ray_node}").exists():
        time.sleep(_POLL_SECONDS)
    time.sleep(seconds)
    with contextlib.suppress(OSError):
        for model in directory.iterdir():
            remove_unused(model)
        directory.rmdir()


def main() -> None:
    """Arguments: the directory, the process id of Ray's node, and seconds."""
    directory, ray_node, seconds = sys.argv[1:]
    only = socket.socket(socket.AF_UNIX)
    try:  # one for each node, whatever number of workers that has
        only.bind(f"\0grokmesh-cache-keeper-{os.geteuid()}-{ray_node}-{directory}")
    except OSError:
        return
    keep(pathlib.Path(directory), int(ray_node), float(seconds))


if __name__ == "__main__":
    main()
