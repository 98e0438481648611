"""A host takes its weights from another one that holds the same, and whatever that sends, it has the right ones in the end."""

from __future__ import annotations

import contextlib
import http.client
import logging
import pathlib
import shutil
from collections.abc import Iterator

import pytest

from tests.conftest import GOLDEN
from tests.workers.checkpoint.test_weights_cache import load, same, spoil_bytes
from workers.checkpoint import twin
from workers.checkpoint.twin import Twin
from workers.host.weights_server import WeightsServer
from workers.messages.specs import WeightsAddress


@pytest.fixture
def checkpoint(tmp_path: pathlib.Path) -> pathlib.Path:
    """A copy of the small golden one."""
    return pathlib.Path(shutil.copytree(GOLDEN / "nano-s1", tmp_path / "nano"))


@pytest.fixture
def server(checkpoint: pathlib.Path, tmp_path: pathlib.Path) -> Iterator[WeightsServer]:
    """Of another host, which has loaded the checkpoint."""
    load(checkpoint, tmp_path / "theirs")
    server = WeightsServer("127.0.0.1", tmp_path / "theirs")
    server.serve_in_background("weights")
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def slow_checkpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(twin, "_probe", lambda file: 0)


def _get(address: WeightsAddress, path: str, secret: str, range_: str | None = None) -> tuple[int, bytes]:
    headers = {"Authorization": f"Bearer {secret}"} | ({"Range": range_} if range_ else {})
    connection = http.client.HTTPConnection(address.host, address.port, timeout=5)
    with contextlib.closing(connection):
        connection.request("GET", path, headers=headers)
        with connection.getresponse() as answer:
            return answer.status, answer.read()


@pytest.mark.usefixtures("slow_checkpoint")
@pytest.mark.parametrize("own_cache", [True, False], ids=["cached", "no room"])
def test_a_host_without_weights_takes_them_from_its_twin(
    checkpoint: pathlib.Path,
    tmp_path: pathlib.Path,
    server: WeightsServer,
    own_cache: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    theirs, mapped = load(checkpoint, tmp_path / "theirs")
    if not own_cache:
        monkeypatch.setattr("os.posix_fallocate", lambda *_: (_ for _ in ()).throw(OSError(28, "no space")))
    nobody = WeightsAddress("127.0.0.1", 1, "")
    taken, progress = load(checkpoint, tmp_path / "own", twins=[nobody, server.address_for_twins])
    same(taken, theirs)
    assert (progress.read, progress.taken, progress.digests) == (0, mapped.mapped, mapped.digests)
    assert load(checkpoint, tmp_path / "own")[1].mapped == (mapped.mapped if own_cache else 0)


def test_the_checkpoint_is_read_if_it_is_faster(
    checkpoint: pathlib.Path, tmp_path: pathlib.Path, server: WeightsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Twin, "probe", lambda self: 0)
    _, progress = load(checkpoint, tmp_path / "own", twins=[server.address_for_twins])
    assert (progress.read, progress.taken) == (progress.total, 0)


@pytest.mark.usefixtures("slow_checkpoint")
def test_one_array_with_other_bytes_is_read_from_the_checkpoint(
    checkpoint: pathlib.Path, tmp_path: pathlib.Path, server: WeightsServer, caplog: pytest.LogCaptureFixture
) -> None:
    spoil_bytes(tmp_path / "theirs")
    with caplog.at_level(logging.WARNING):
        taken, progress = load(checkpoint, tmp_path / "own", twins=[server.address_for_twins])
    assert caplog.text.count("is read from the checkpoint: 127.0.0.1 has sent other bytes") == 1
    assert 0 < progress.read < progress.total / 2
    same(taken, load(checkpoint, tmp_path / "another")[0])
    same(load(checkpoint, tmp_path / "own")[0], taken)


@pytest.mark.usefixtures("slow_checkpoint")
def test_a_twin_that_dies_is_done_without(
    checkpoint: pathlib.Path, tmp_path: pathlib.Path, server: WeightsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    take = Twin.take
    taken_so_far: list[object] = []

    def dying(self: Twin, *arguments: object) -> None:
        if len(taken_so_far) == 20:
            server.secret = "another process's"
        taken_so_far.append(arguments)
        take(self, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(Twin, "take", dying)
    taken, progress = load(checkpoint, tmp_path / "own", twins=[server.address_for_twins])
    assert progress.read > 0
    assert progress.taken > 0
    assert len(taken_so_far) < 30
    same(taken, load(checkpoint, tmp_path / "another")[0])


@pytest.mark.usefixtures("slow_checkpoint")
def test_a_host_that_holds_something_else_is_no_twin(
    checkpoint: pathlib.Path, tmp_path: pathlib.Path, server: WeightsServer
) -> None:
    _, progress = load(checkpoint, tmp_path / "own", devices=1, twins=[server.address_for_twins])
    assert (progress.read, progress.taken) == (progress.total, 0)


def test_the_server_gives_the_caches_files_to_those_that_know_the_secret(
    tmp_path: pathlib.Path, server: WeightsServer
) -> None:
    address = server.address_for_twins
    index = next((tmp_path / "theirs").rglob("index.json"))
    folder, content = "/" + str(index.parent.relative_to(tmp_path / "theirs")), index.read_bytes()
    (tmp_path / "theirs" / "x").write_text("x")
    assert _get(address, f"{folder}/index.json", address.secret) == (200, content)
    assert _get(address, f"{folder}/index.json", address.secret, "bytes=3-9") == (206, content[3:10])
    assert _get(address, f"{folder}/index.json", "wrong")[0] == 401
    for path in (
        f"{folder}/none",
        f"{folder}/../../x",
        "/x",
        f"{folder}/..",
        "/",
        f"{folder}/%2e%2e/x",
        "//etc/passwd",
    ):
        assert _get(address, path, address.secret)[0] == 404, path
    for range_ in ("bytes=9-3", f"bytes=0-{len(content)}", "bytes=a-b", "bytes=-5", "lines=1-2"):
        assert _get(address, f"{folder}/index.json", address.secret, range_)[0] == 416, range_
    assert address.secret not in repr(address)
