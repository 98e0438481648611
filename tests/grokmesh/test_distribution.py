"""The client can be installed without the rest, and the rest contains it."""

from __future__ import annotations

import pathlib
import shutil
import subprocess
import sys
import venv
import zipfile

import pytest

from tests.support.fake_service import serving

PROJECT = pathlib.Path(__file__).parents[2]
#: What the client's wheel needs, as the lock has it.
NEEDED = ("googleapis-common-protos", "grpcio", "protobuf", "typing-extensions")


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """The wheels of the client and of the whole, made from a copy of the sources."""
    folder = tmp_path_factory.mktemp("sources")
    for name in ("grokmesh", "cluster", "workers", "tools", "proto"):
        shutil.copytree(
            PROJECT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info", "*.so")
        )
    for name in ("pyproject.toml", "README.md", "LICENSE"):  # without setup.py no kernels are compiled
        shutil.copy(PROJECT / name, folder)
    for source in (folder / "grokmesh", folder):
        command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
        subprocess.run([*command, "--wheel-dir", folder / "dist", source], check=True)
    return folder / "dist"


def _modules(wheel: pathlib.Path) -> set[str]:
    return {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}


def _requirements() -> str:
    """The lines of the lock for what the client needs."""
    entries = (PROJECT / "requirements-dev.lock").read_text().replace("\\\n", "").splitlines()
    return "\n".join(entry for entry in entries if entry.split("==")[0] in NEEDED)


def test_the_whole_contains_the_client_and_both_say_what_types_they_have(wheels: pathlib.Path) -> None:
    (client,), (whole,) = wheels.glob("grokmesh_client-*.whl"), wheels.glob("grokmesh-*.whl")
    assert {name.split("/")[0] for name in _modules(client)} == {"grokmesh", "grok"}
    assert {"grokmesh/py.typed", "grokmesh/client.py", "grok/serving/v1/generation_pb2.pyi"} <= _modules(client)
    assert _modules(client) <= _modules(whole)


def test_the_client_alone_talks_to_a_service(wheels: pathlib.Path, tmp_path: pathlib.Path) -> None:
    venv.create(tmp_path / "venv", with_pip=True)
    python, requirements = tmp_path / "venv" / "bin" / "python", tmp_path / "requirements.txt"
    requirements.write_text(_requirements())
    install: list[str | pathlib.Path] = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*install, "--require-hashes", "-r", requirements], check=True)
    subprocess.run([*install, "--no-deps", "--no-index", *wheels.glob("grokmesh_client-*.whl")], check=True)
    subprocess.run([python, "-m", "pip", "check"], check=True)
    with serving() as (address, _):
        code = f"""
import grokmesh
with grokmesh.Client("{address}") as client:
    print(client.model().name, client.serving(), len(client.complete("x", max_tokens=3).tokens))
    print(sum(len(part.tokens) for part in client.generate("x", max_tokens=4, n=2)))
"""
        done = subprocess.run([python, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=True)
    assert done.stdout.split() == ["demo", "True", "3", "8"]
