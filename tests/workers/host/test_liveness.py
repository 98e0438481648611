"""A worker that is silent is lost only if a second look shows it."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest

from tests.support.waiting import wait_until
from workers.host import liveness
from workers.host.liveness import MOST_SILENT_SECONDS, Signs, ask, why_lost

_START = "from workers.host.liveness import start_server; print(start_server('127.0.0.1'), flush=True); "
_SLEEPS = _START + "import time; time.sleep(1000)"
_COMPUTES = _START + "\nwhile True: pass"


@contextlib.contextmanager
def _worker(code: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A process that has the small one beside it, and where that listens."""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield process, process.stdout.readline().strip()
        finally:
            process.kill()


def _ends(address: str) -> bool:
    try:
        ask(address, 1.0)
    except ConnectionRefusedError:
        return True
    except ConnectionResetError:  # it ends at this moment
        return False
    return False


def test_a_worker_that_waits_for_a_processor_lives() -> None:
    with _worker(_COMPUTES) as (_, address):
        assert why_lost(address, 2.0) is None


def test_a_worker_that_is_stopped_for_a_moment_lives() -> None:
    with _worker(_COMPUTES) as (process, address):
        process.send_signal(signal.SIGSTOP)
        wait_until(lambda: ask(address, 1.0).stopped, 5)
        assert why_lost(address, 2.0, 0.2) == "its process is stopped"
        process.send_signal(signal.SIGCONT)
        assert why_lost(address, 2.0) is None


def test_a_worker_that_does_nothing_hangs() -> None:
    with _worker(_SLEEPS) as (_, address):
        wait_until(lambda: set(ask(address, 1.0).states) == {"S"}, 5)
        assert why_lost(address, 2.0, 0.3) == "its process hangs"


def test_the_process_beside_a_worker_ends_with_it() -> None:
    with _worker(_SLEEPS) as (process, address):
        process.kill()
        process.wait()
        wait_until(lambda: _ends(address), 5)
        assert why_lost(address, 2.0) == "its process has ended"


def test_a_host_that_does_not_answer_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(address: str, seconds: float) -> Signs:
        raise TimeoutError(f"{address} after {seconds}")

    monkeypatch.setattr(liveness, "ask", unreachable)
    assert why_lost("10.255.255.1:1", 2.0, 0.2) == "its host can't be reached"


def test_silence_is_enough_without_a_second_path_or_after_long() -> None:
    assert why_lost("", 1.5) == "it has been silent for 1.5 s"
    with _worker(_COMPUTES) as (_, address):
        assert why_lost(address, MOST_SILENT_SECONDS + 1) is not None


@pytest.mark.parametrize(
    ("states", "used", "lives"), [("SS", 1.0, False), ("SD", 1.0, True), ("SS", 1.1, True), ("TT", 1.0, False)]
)
def test_a_process_lives_that_works_or_has_worked(states: str, used: float, lives: bool) -> None:
    assert Signs(states, used).lives(Signs("S", 1.0)) is lives
