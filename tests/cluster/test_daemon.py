"""Background services are found by their address, and only while they live."""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys

import pytest

from cluster import daemon

ADDRESS = "127.0.0.1:6001"


@pytest.fixture(autouse=True)
def state(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Notes of this test only."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))


def test_a_service_is_found_while_it_runs() -> None:
    assert daemon.running(ADDRESS) is None
    with daemon.noted(ADDRESS):
        assert daemon.running(ADDRESS) == os.getpid()
        assert daemon.running("127.0.0.2:6001") is None
    assert daemon.running(ADDRESS) is None


def test_a_second_service_at_an_address_is_refused_and_the_first_stays_known() -> None:
    with daemon.noted(ADDRESS):
        with pytest.raises(daemon.DaemonError, match=r"runs at 127\.0\.0\.1:6001 already"), daemon.noted(ADDRESS):
            pass
        assert daemon.running(ADDRESS) == os.getpid()


def test_a_service_that_was_killed_is_not_taken_for_a_process_of_its_number() -> None:
    code = f"import os; from cluster import daemon\nwith daemon.noted('{ADDRESS}'): os._exit(1)"
    subprocess.run([sys.executable, "-c", code], check=False)
    assert daemon.running(ADDRESS) is None
    with pytest.raises(daemon.DaemonError, match="no service of yours runs"):
        daemon.stop(ADDRESS)


def test_an_address_without_port_is_explained() -> None:
    with pytest.raises(daemon.DaemonError, match="localhost is no host:port"):
        daemon.stop("localhost")
