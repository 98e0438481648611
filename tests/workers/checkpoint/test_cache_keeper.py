"""What removes a weights cache when Ray has ended on its host."""

from __future__ import annotations

import fcntl
import os
import pathlib
import subprocess
import sys

from tests.support.waiting import wait_until
from workers.checkpoint import cache_keeper
from workers.checkpoint.folder_locks import LOCK, locked


def _filled(directory: pathlib.Path, model: str) -> pathlib.Path:
    folder = directory / model
    folder.mkdir(parents=True)
    (folder / "weights").write_bytes(b"1")
    (folder / LOCK).touch()
    return folder


def _keeper(directory: pathlib.Path, ray_node: int) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-m", cache_keeper.__name__, str(directory), str(ray_node), "0.1"])


def test_a_cache_goes_some_time_after_ray_but_not_what_another_service_uses(tmp_path: pathlib.Path) -> None:
    unused, used = _filled(tmp_path / "cache", "unused"), _filled(tmp_path / "cache", "used")
    descriptor = locked(used / LOCK, fcntl.LOCK_SH)
    node = subprocess.Popen(["sleep", "60"])
    try:
        keepers = [_keeper(tmp_path / "cache", node.pid) for _ in range(3)]
        wait_until(lambda: [keeper.poll() for keeper in keepers].count(0) == 2, 20)  # one is enough
        assert unused.exists()
        node.kill()
        node.wait()
        assert [keeper.wait(20) for keeper in keepers] == [0, 0, 0]
        assert not unused.exists()
        assert used.exists()
    finally:
        node.kill()
        node.wait()
        os.close(descriptor)


def test_the_keeper_is_no_child_of_the_process_that_starts_it(tmp_path: pathlib.Path) -> None:
    node = subprocess.Popen(["sleep", "60"])
    try:
        cache_keeper.start_keeper(str(tmp_path / "cache"), node.pid)

        def parents() -> list[int]:
            found = subprocess.run(["pgrep", "-f", f"cache_keeper {tmp_path}/cache"], capture_output=True, text=True)
            states = [pathlib.Path(f"/proc/{pid}/stat").read_text() for pid in found.stdout.split()]
            return [int(state.rpartition(")")[2].split()[1]) for state in states]

        wait_until(lambda: bool(parents()), 20)
        assert os.getpid() not in parents()
        subprocess.run(["pkill", "-f", f"cache_keeper {tmp_path}/cache"], check=True)
    finally:
        node.kill()
        node.wait()
