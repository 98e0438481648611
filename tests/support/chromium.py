"""Headless Chromium, with nothing of its own going out to a network."""

from __future__ import annotations

import pathlib
import subprocess

_OPTIONS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
)  # fmt: skip


def chromium(profile: pathlib.Path, *arguments: str) -> str:
    """Runs it on an empty profile and returns what it prints."""
    command = ["chromium", *_OPTIONS, f"--user-data-dir={profile}", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
