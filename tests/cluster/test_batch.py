"""Batches: every line is answered once, whatever happens meanwhile."""

from __future__ import annotations

import json
import os
import pathlib
import random
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from cluster.batch import BatchError, open_results, read_requests
from cluster.cli import main
from tests.support.fake_service import serving
from tests.support.ports import free_port

#: Of a batch, how often it is killed, and bytes that a result has at least.
LINES, KILLS, LINE_BYTES = int(os.environ.get("GROKMESH_BATCH_LINES", "60")), 5, 300


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """Of a service whose steps take a moment."""
    address = f"127.0.0.1:{free_port('127.0.0.1')}"
    with serving(0.02, http_address=address):
        yield f"http://{address}"


def _line(name: str, **body: object) -> str:
    asked = {"model": "demo", "prompt": "x", "max_tokens": 10, "ignore_eos": True, **body}
    return json.dumps({"custom_id": name, "method": "POST", "url": "/v1/completions", "body": asked})


def _write(folder: pathlib.Path, lines: list[str]) -> tuple[pathlib.Path, pathlib.Path]:
    requests = folder / "requests.jsonl"
    requests.write_text("\n".join(lines))
    return requests, folder / "results.jsonl"


def _size(path: pathlib.Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _results(path: pathlib.Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_batch_that_is_killed_goes_on_and_answers_every_line_once(url: str, tmp_path: pathlib.Path) -> None:
    names, rng = [f"line-{i}" for i in range(LINES)], random.Random(0)
    requests, results = _write(tmp_path, [_line(name) for name in names])
    command = [
        sys.executable,
        "-m",
        "cluster.cli",
        "batch",
        str(requests),
        str(results),
        "--url",
        url,
        "--at-once",
        "4",
    ]
    kills = 0
    while kills < KILLS:
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        enough = _size(results) + rng.randrange(1, LINES * LINE_BYTES // (KILLS + 1))
        while process.poll() is None and _size(results) < enough:
            time.sleep(0.01)
        assert process.poll() is None, "it has ended before it could be killed"
        process.kill()
        process.wait()
        kills += 1
        with results.open("a") as file:
            file.write('{"custom_id": "line-')  # as if it had been killed within a line
    assert subprocess.run(command, stderr=subprocess.DEVNULL, check=False).returncode == 0
    assert sorted(str(found["custom_id"]) for found in _results(results)) == sorted(names)
    assert all(found["error"] is None for found in _results(results))
    size = results.stat().st_size
    assert subprocess.run(command, stderr=subprocess.DEVNULL, check=False).returncode == 0
    assert results.stat().st_size == size


def test_a_request_that_is_wrong_fails_alone(
    url: str, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    requests, results = _write(tmp_path, [_line("good"), _line("bad", temperature=-1)])
    assert main(["batch", str(requests), str(results), "--url", url]) == 1
    assert "1 requests failed" in capsys.readouterr().err
    by_name = {found["custom_id"]: found for found in _results(results)}
    assert by_name["good"]["error"] is None
    assert by_name["bad"]["error"]["param"] == "temperature"  # type: ignore[index]


@pytest.mark.parametrize(
    ("lines", "problem"),
    [
        (["{"], r"requests\.jsonl:1: no JSON"),
        ([_line("a"), _line("a")], r":2: custom_id 'a' is there twice"),
        (['{"url": "/v1/completions"}'], "custom_id"),
        (['{"custom_id": "a", "url": "/v1/embeddings", "body": {}}'], "url one of /v1/completions"),
        ([_line("a", stream=True)], "without stream"),
    ],
)
def test_what_is_wrong_in_the_file_is_named(lines: list[str], problem: str, tmp_path: pathlib.Path) -> None:
    with pytest.raises(BatchError, match=problem):
        read_requests(_write(tmp_path, lines)[0])


def test_results_have_one_writer_and_are_never_other_files(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "results.jsonl"
    with open_results(path), pytest.raises(BatchError, match="another process"), open_results(path):
        pass
    path.write_text("notes of mine\n")
    with pytest.raises(BatchError, match=r"results\.jsonl:1: no answer of a batch"), open_results(path):
        pass
    assert path.read_text() == "notes of mine\n"


def test_a_service_that_is_away_is_waited_for_and_then_given_up(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    requests, results = _write(tmp_path, [_line("a")])
    url = f"http://127.0.0.1:{free_port('127.0.0.1')}"
    assert main(["batch", str(requests), str(results), "--url", url, "--patience", "0.2"]) == 2
    assert "run it again to go on" in capsys.readouterr().err
    assert results.read_text() == ""
