"""Background services are found by their address, and only while they live."""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys

import pytest

from cluster import daemon

ADDRESS = "127.0.0.1:6001"
ENTRY = daemon.Entry("key")


@pytest.fixture(autouse=True)
def state(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Notes of this test only."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))


def test_a_service_is_found_while_it_runs() -> None:
    assert daemon.running(ADDRESS) is None
    with daemon.noted(ADDRESS, ENTRY):
        assert daemon.running(ADDRESS) == os.getpid()
        assert daemon.running("127.0.0.2:6001") is None
    assert daemon.running(ADDRESS) is None


def test_a_second_service_at_an_address_is_refused_and_the_first_stays_known() -> None:
    with daemon.noted(ADDRESS, ENTRY):
        with (
            pytest.raises(daemon.DaemonError, match=r"runs at 127\.0\.0\.1:6001 already"),
            daemon.noted(ADDRESS, ENTRY),
        ):
            pass
        assert daemon.running(ADDRESS) == os.getpid()


def test_a_service_that_was_killed_is_not_taken_for_a_process_of_its_number() -> None:
    entry = "daemon.Entry('key', 'ray:1', 'name')"
    code = f"import os; from cluster import daemon\nwith daemon.noted('{ADDRESS}', {entry}): os._exit(1)"
    subprocess.run([sys.executable, "-c", code], check=False)
    assert daemon.running(ADDRESS) is None
    with pytest.raises(daemon.DaemonError, match="no service of yours runs"):
        daemon.stop(ADDRESS)
    assert daemon.left(ADDRESS) == daemon.Entry("key", "ray:1", "name")
    daemon.clear(ADDRESS)
    assert daemon.left(ADDRESS) is None


def test_a_service_that_is_stopped_leaves_nothing() -> None:
    with daemon.noted(ADDRESS, daemon.Entry("key", "ray:1", "name")):
        assert daemon.left(ADDRESS) is None, "it is there"
    assert daemon.left(ADDRESS) is None


def test_an_address_without_port_is_explained() -> None:
    with pytest.raises(daemon.DaemonError, match="localhost is no host:port"):
        daemon.stop("localhost")


def test_budgets_are_left_to_the_next_service_at_an_address() -> None:
    assert daemon.left_budgets(ADDRESS) == ({}, 0.0)
    daemon.leave_budgets(ADDRESS, {"alice": (60, 41.5)})
    budgets, seconds = daemon.left_budgets(ADDRESS)
    assert budgets == {"alice": (60, 41.5)}
    assert 0 <= seconds < 60
    assert daemon.left_budgets("127.0.0.2:6001") == ({}, 0.0)


def test_budgets_that_can_not_be_read_keep_no_service_from_starting(tmp_path: pathlib.Path) -> None:
    daemon.leave_budgets(ADDRESS, {"alice": (60, 41.5)})
    (file,) = tmp_path.glob("grokmesh/*.budgets")
    for content in ("", "[", "[]", '{"at": 1}', '{"at": "?", "budgets": {}}', '{"at": 1, "budgets": {"alice": [60]}}'):
        file.write_text(content)
        assert daemon.left_budgets(ADDRESS) == ({}, 0.0)
