"""The documentation: its links lead somewhere, its references are fresh, its commands run."""

from __future__ import annotations

import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator

import pytest

from cluster.cli import main
from tools import generate_docs

PROJECT = pathlib.Path(__file__).parent.parent
PAGES = sorted(
    [
        PROJECT / "README.md",
        PROJECT / "CONTRIBUTING.md",
        PROJECT / "models/demo/README.md",
        *(PROJECT / "docs").glob("*.md"),
    ]
)
#: Commands of the operator's guide that need no cluster, and are run here; tests/rayup runs those of `ray up`.
RUN_HERE = ("grokmesh inspect", "grokmesh key", "promtool")


def _text(page: pathlib.Path) -> str:
    """A page without its code."""
    return re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)


def _anchors(page: pathlib.Path) -> set[str]:
    titles = re.findall(r"^#+ (.*)$", _text(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def _blocks(page: pathlib.Path, language: str) -> list[str]:
    found: list[str] = re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)
    return found


def _commands(page: pathlib.Path) -> Iterator[str]:
    for block in _blocks(page, "sh"):
        for line in block.splitlines():
            command = line.split(" #")[0].strip()
            if command:
                yield command


@pytest.mark.parametrize("page", PAGES, ids=[str(page.relative_to(PROJECT)) for page in PAGES])
def test_links_lead_somewhere(page: pathlib.Path) -> None:
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", _text(page)):
        if re.match(r"https?://", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (anchor and anchor not in _anchors(target)):
            broken.append(link)
    assert broken == []


def test_the_references_are_what_the_sources_say(tmp_path: pathlib.Path) -> None:
    generate_docs.main(tmp_path)
    for path in tmp_path.iterdir():
        assert path.read_text() == (PROJECT / "docs" / path.name).read_text(), f"run make docs: {path.name} is old"


@pytest.mark.parametrize("page", PAGES, ids=[str(page.relative_to(PROJECT)) for page in PAGES])
def test_commands_exist(page: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (PROJECT / "Makefile").read_text(), re.MULTILINE))
    for command in _commands(page):
        words = [word for word in shlex.split(command) if "=" not in word or word.startswith("-")]
        program, arguments = pathlib.Path(words[0]).name, words[1:]
        if program == "make":
            assert set(arguments) <= targets, command
        elif program == "grokmesh":
            with pytest.raises(SystemExit) as ended:
                main([*arguments[: 2 if arguments[0] == "bench" else 1], "--help"])
            assert ended.value.code == 0, command
            known = capsys.readouterr().out
            assert all(flag in known for flag in arguments if flag.startswith("--")), command
        else:
            assert program in ("curl", "lm_eval", "ray", "kubectl", "promtool", "uv", "python"), command
        for word in arguments:
            if re.match(r"(deploy|models|tests|tools)/", word):
                assert (PROJECT / word).exists(), command


def _run(command: str, **environment: str) -> str:
    path = f"{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        command, shell=True, cwd=PROJECT, env={**os.environ, "PATH": path, **environment},
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
    return done.stdout


def test_the_commands_of_the_operators_guide_run() -> None:
    ran = 0
    for command in _commands(PROJECT / "docs" / "operations.md"):
        if command.startswith(RUN_HERE) and (shutil.which("promtool") or not command.startswith("promtool")):
            _run(command)
            ran += 1
    assert ran >= 2


def test_the_quickstart_runs_as_it_is_written(tmp_path: pathlib.Path) -> None:
    page = PROJECT / "docs" / "quickstart.md"
    commands = list(_commands(page))
    assert commands[:2] == ["make install", "make serve"]
    assert commands[-1] == "make stop"
    (script,) = _blocks(page, "python")
    if not (PROJECT / ".venv" / ".installed").exists():
        pytest.skip("needs the environment that make install makes")
    state = {"XDG_STATE_HOME": str(tmp_path)}
    try:
        assert "serving" in _run("; ".join(commands[:2]), **state).splitlines()
        shown = {command: _run(command, **state) for command in commands[2:-1]}
        text = _run(f"python -c {shlex.quote(script)}", **state)
    finally:
        ended = _run(commands[-1], **state)
    assert "has ended" in ended
    (generated,) = [output for command, output in shown.items() if " generate " in command]
    assert text == generated.rstrip("\n")
    assert "replica 0: ready" in "".join(shown.values())
