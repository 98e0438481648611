"""What removes a weights cache when Ray has ended on its host."""

from __future__ import annotations

import fcntl
import os
import pathlib
import shutil
import subprocess
import sys
import time

import pytest

from tests.support.waiting import wait_until
from workers.checkpoint import cache_keeper
from workers.checkpoint.folder_locks import LOCK, locked


@pytest.fixture
def node(tmp_path: pathlib.Path) -> pathlib.Path:
    """A program that runs for a minute, of a name that no other has."""
    return pathlib.Path(shutil.copy("/bin/sleep", tmp_path / f"node-{os.getpid()}"[-15:]))


def _filled(directory: pathlib.Path, model: str) -> pathlib.Path:
    folder = directory / model
    folder.mkdir(parents=True)
    (folder / "weights").write_bytes(b"1")
    (folder / LOCK).touch()
    return folder


def _keeper(directory: pathlib.Path, node: pathlib.Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-m", cache_keeper.__name__, str(directory), "2", node.name])


def test_a_cache_goes_some_time_after_ray_but_not_what_another_service_uses(
    tmp_path: pathlib.Path, node: pathlib.Path
) -> None:
    cache = tmp_path / ("long" * 30) / "cache"  # longer than the name of a socket may be
    unused, used = _filled(cache, "unused"), _filled(cache, "used")
    descriptor = locked(used / LOCK, fcntl.LOCK_SH)
    first = subprocess.Popen([node, "60"])
    try:
        keepers = [_keeper(cache, node) for _ in range(3)]
        wait_until(lambda: [keeper.poll() for keeper in keepers].count(0) == 2, 20)  # one is enough
        first.kill()
        first.wait()
        again = subprocess.Popen([node, "3"])  # Ray is back, as after `ray up`
        again.wait()
        assert unused.exists()
        ended = time.monotonic()
        assert [keeper.wait(20) for keeper in keepers] == [0, 0, 0]
        assert time.monotonic() - ended > 1
        assert not unused.exists()
        assert used.exists()
    finally:
        first.kill()
        first.wait()
        os.close(descriptor)


def test_the_keeper_is_no_child_of_the_process_that_starts_it(
    tmp_path: pathlib.Path, node: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache_keeper, "RAY_NODE", node.name)
    with subprocess.Popen([node, "60"]) as running:
        cache_keeper.start_keeper(str(tmp_path / "cache"))

        def parents() -> list[int]:
            words = ["pgrep", "-f", f"cache_keeper {tmp_path}/cache"]
            found = subprocess.run(words, capture_output=True, text=True, check=False)
            states = [pathlib.Path(f"/proc/{pid}/stat").read_text() for pid in found.stdout.split()]
            return [int(state.rpartition(")")[2].split()[1]) for state in states]

        wait_until(lambda: bool(parents()), 20)
        assert os.getpid() not in parents()
        subprocess.run(["pkill", "-f", f"cache_keeper {tmp_path}/cache"], check=True)
        running.kill()


def test_a_host_that_can_start_no_keeper_serves_all_the_same(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    cache_keeper.start_keeper("/dev/shm/none")
    assert "will be kept when Ray has ended" in caplog.text
