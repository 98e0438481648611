"""A job that takes too much ends, and nothing else does."""

from __future__ import annotations

import os
import pathlib
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection

import pytest

from tests.support.waiting import wait_until
from workers.text.sandbox import Budget, Sandbox, SandboxError, hang_up

PROJECT = pathlib.Path(__file__).parents[3]
BUDGET = Budget(seconds=0.3, mebibytes=64)


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    """One whose children do what they are told, see `tests.workers.text.sandbox_job`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(PROJECT))
        made = Sandbox("tests.workers.text.sandbox_job", [])
        yield made
        made.close()


def _answer(sandbox: Sandbox, job: str) -> bytes | None:
    """What a child answers, None if it ends without a word."""
    with sandbox.job(BUDGET) as stream:
        stream.send_bytes(job.encode())
        try:
            return stream.recv_bytes()
        except (EOFError, OSError):
            return None


@pytest.mark.parametrize("job", ["compute", "grow", "die"])
def test_whatever_a_job_does_only_the_job_ends(sandbox: Sandbox, job: str) -> None:
    assert _answer(sandbox, "hello") == b"hello"
    assert _answer(sandbox, job) is None
    assert _answer(sandbox, "hello") == b"hello"


def test_time_that_a_job_waits_does_not_count(sandbox: Sandbox) -> None:
    with sandbox.job(BUDGET) as stream:
        for _ in range(3):
            time.sleep(0.2)
            stream.send_bytes(b"hello")
            assert stream.recv_bytes() == b"hello"


def test_a_job_ends_when_nobody_waits_any_more(sandbox: Sandbox) -> None:
    streams: list[Connection] = [sandbox.job(BUDGET) for _ in range(2)]
    pids = []
    for stream in streams:
        stream.send_bytes(b"pid")
        pids.append(int(stream.recv_bytes()))
    hang_up(streams[0])
    streams[1].close()
    wait_until(lambda: not any(_lives(pid) for pid in pids), 5)
    streams[0].close()


def test_a_template_that_has_died_is_started_again(sandbox: Sandbox) -> None:
    parent = int(_answer(sandbox, "parent") or b"0")
    os.kill(parent, 9)
    wait_until(lambda: _answer(sandbox, "hello") == b"hello", 10)
    assert int(_answer(sandbox, "parent") or b"0") != parent


def test_a_sandbox_that_is_closed_takes_no_job() -> None:
    closed = Sandbox("tests.workers.text.sandbox_job", [])
    closed.close()
    with pytest.raises(SandboxError):
        closed.job(BUDGET)


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
