"""Fuzzes one target, guided by which code its inputs reach; `make fuzz` does it for all.

    PYTHONPATH=build/fuzz python -m tests.fuzz.run gateway -runs=1000000

What is found lies in build/fuzz/found; once mended it belongs in tests/fuzz/corpus, where a test tries it.
"""

from __future__ import annotations

import pathlib
import sys

import atheris  # type: ignore[import-untyped]

with atheris.instrument_imports(include=["cluster", "workers"]):
    from tests.fuzz.targets import TARGETS, seeds

BUILD = pathlib.Path("build/fuzz")
#: Seconds and MiB that an input may take, and its bytes.
LIMITS = ("-timeout=10", "-rss_limit_mb=2048", "-max_len=8192", "-print_final_stats=1", "-verbosity=0")


def main() -> None:
    """Runs until there is a finding, or as libFuzzer's options say."""
    target, *options = sys.argv[1:]
    known, found = BUILD / "corpus" / target, BUILD / "found" / target
    for folder in (known, found):
        folder.mkdir(parents=True, exist_ok=True)
    for i, seed in enumerate(seeds(target)):
        (known / f"seed{i}").write_bytes(seed)
    atheris.Setup([sys.argv[0], str(known), f"-artifact_prefix={found}/", *LIMITS, *options], TARGETS[target])
    atheris.Fuzz()


if __name__ == "__main__":
    main()
