"""A plan log computed again: a difference is found and named."""

from __future__ import annotations

import pathlib
import stat
import sys

import pytest

from tests.support.fake_mesh import FakeRuntime, leading
from tests.support.waiting import wait_until
from tools import replay
from workers.host.plan_log import Entry, LoggedEngine, PlanLog, read_log
from workers.host.streams import connect
from workers.messages.codec import encode
from workers.messages.frames import Hello, LeaderInput
from workers.messages.plan import EngineShape, Sampling
from workers.messages.request import Request
from workers.messages.specs import EngineSpec, MeshSpec, ModelSpec

SHAPE = EngineShape(slots=2, groups=1, pages=9, page_size=4, chunk=8, context=32)
ENGINE = LoggedEngine(ModelSpec("m", "/m"), MeshSpec("cpu", 1, 1, 1, 1, "tensor"), EngineSpec(), "xla")


def _entries(path: pathlib.Path) -> list[Entry]:
    with path.open("rb") as file:
        return list(read_log(file))


@pytest.fixture
def log(tmp_path: pathlib.Path) -> pathlib.Path:
    """The log of a leader that has generated a few tokens, all of them 5."""
    path = tmp_path / "logs" / "replica0-epoch1.plans"
    with leading(SHAPE, 100, 10, plan_log=PlanLog(path, ENGINE)) as address:
        link = connect(address, Hello(1, b"s"), 5)
        link.send(encode(LeaderInput(Request("r", (3, 4), 6, Sampling()))))
        # The canary's token, and the request's six.
        wait_until(lambda: sum(entry.tokens is not None for entry in _entries(path)) >= 7, 10)
        link.close()
    return path


def _replay(log: pathlib.Path, token: int, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(replay, "_runtime", lambda *_: FakeRuntime(SHAPE, token=token))
    monkeypatch.setattr(sys, "argv", ["replay", str(log)])
    return replay.main()


def test_the_same_tokens_are_no_difference(
    log: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _entries(log)[0].engine == ENGINE
    assert _replay(log, 5, monkeypatch) == 0
    assert "7 plans came to the same tokens" in capsys.readouterr().out


def test_the_first_plan_that_differs_is_named(
    log: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _replay(log, 6, monkeypatch) == 1
    assert "plan 1 differs" in capsys.readouterr().out


def test_what_a_killed_leader_has_written_is_read(log: pathlib.Path) -> None:
    whole = _entries(log)
    log.write_bytes(log.read_bytes()[:-3])
    assert _entries(log) == whole[:-1]


def test_no_other_user_can_read_it(log: pathlib.Path) -> None:
    assert stat.S_IMODE(log.stat().st_mode) == 0o600


def test_another_file_is_no_log(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "empty").touch()
    assert _replay(tmp_path / "empty", 5, monkeypatch) == 2
