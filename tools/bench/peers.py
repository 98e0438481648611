"""This engine and llama.cpp in turn, on the same model, with the same threads, in one run: ratios, medians and their noise.

python -m tools.bench.peers --llama-python PYTHON [--xai CHECKOUT --xai-python PYTHON] [--rounds 5] [--output FILE]
The first PYTHON is of an environment with llama-cpp-python, the second of one that runs xAI's code in CHECKOUT.
Each round measures every engine once in every case, and reads memory's bandwidth beside it.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import platform
import statistics
import subprocess
import sys
from typing import Any

from tools.bench.checkpoint import make_checkpoint
from tools.bench.limits import matmul_peak, read_bandwidth
from tools.gguf_export import export_gguf
from workers.checkpoint.checkpoint import open_checkpoint

CASES: list[dict[str, Any]] = [
    *({"kind": "decode", "batch": batch, "positions": 16, "steps": 24} for batch in (1, 4, 8, 16)),
    {"kind": "prefill", "positions": 512},
]
LONG_CASES: list[dict[str, Any]] = [
    {"kind": "decode", "batch": batch, "positions": 8000, "steps": 16} for batch in (1, 8)
]


class Peer:
    """An engine in a process of its own."""

    def __init__(self, name: str, command: list[str]) -> None:
        self.name = name
        script = str(pathlib.Path(__file__).with_name("peer_steps.py"))
        self._process = subprocess.Popen(
            [command[0], script, *command[1:]], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self._read()

    def run(self, case: dict[str, Any]) -> dict[str, float]:
        """Seconds of a case."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(case) + "\n")
        self._process.stdin.flush()
        return self._read()

    def close(self) -> None:
        """Ends the process."""
        self._process.kill()
        self._process.wait()

    def _read(self) -> dict[str, float]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.name} has ended")
        answer: dict[str, float] = json.loads(line)
        return answer


def compare(peers: list[Peer], case: dict[str, Any], rounds: int) -> dict[str, Any]:
    """Medians of the seconds of each, of the ratios to the first within a round, and of the shares of bandwidth."""
    seconds: dict[str, list[float]] = {peer.name: [] for peer in peers}
    shares: dict[str, list[float]] = {peer.name: [] for peer in peers}
    bandwidths = []
    for _ in range(rounds):
        for peer in peers:
            bandwidths.append(read_bandwidth(2))
            answer = peer.run(case)
            seconds[peer.name].append(answer["seconds"])
            if "bytes" in answer:
                shares[peer.name].append(answer["bytes"] / answer["seconds"] / bandwidths[-1])
    base = seconds[peers[0].name]
    ratios = {
        name: [theirs / mine for theirs, mine in zip(base, values, strict=True)] for name, values in seconds.items()
    }
    return {
        "case": case,
        "seconds": {name: statistics.median(values) for name, values in seconds.items()},
        "times_first": {name: statistics.median(values) for name, values in ratios.items()},
        "spread": {name: (min(values), max(values)) for name, values in ratios.items()},
        "share_of_bandwidth": {name: statistics.median(values) for name, values in shares.items() if values},
        "bandwidth": statistics.median(bandwidths),
    }


def _line(result: dict[str, Any]) -> str:
    case = result["case"]
    tokens = case["batch"] if case["kind"] == "decode" else case["positions"]
    title = f"{case['kind']} " + (f"batch {case['batch']} at {case['positions']}" if "batch" in case else str(tokens))
    parts = [f"{title:<24}"]
    for name, seconds in result["seconds"].items():
        low, high = result["spread"][name]
        share = result["share_of_bandwidth"].get(name)
        shown = f", {share:.0%} of bandwidth" if share else ""
        ratio = (
            ""
            if name == next(iter(result["seconds"]))
            else f" {result['times_first'][name]:.2f} x ({low:.2f}-{high:.2f}){shown}"
        )
        parts.append(f"{name} {tokens / seconds:.1f}/s{ratio}")
    return " | ".join(parts) + f" | {result['bandwidth'] / 1e9:.0f} GB/s"


def main() -> int:
    """Prints a line a case."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--llama-python", required=True)
    parser.add_argument("--xai", help="a checkout of xAI's code")
    parser.add_argument("--xai-python")
    parser.add_argument("--checkpoint", type=pathlib.Path, default=pathlib.Path("build/bench/model"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--short", action="store_true", help="leave out the cases with 8,000 positions")
    parser.add_argument("--output", type=pathlib.Path)
    arguments = parser.parse_args()
    make_checkpoint(arguments.checkpoint)
    checkpoint = open_checkpoint(arguments.checkpoint)
    files = {kind: arguments.checkpoint / f"model-{kind}.gguf" for kind in ("q8_0", "q4_0")}
    for kind, file in files.items():
        if not file.exists():
            export_gguf(checkpoint, file, kind)
    peers = [
        Peer("llama.cpp", [arguments.llama_python, "llama", str(files["q8_0"])]),
        Peer("exact", [sys.executable, "ours", str(arguments.checkpoint), "int8"]),
        Peer("unrounded", [sys.executable, "ours", str(arguments.checkpoint), "int8-unrounded"]),
    ]
    in_4_bits = [
        Peer("llama.cpp Q4_0", [arguments.llama_python, "llama", str(files["q4_0"])]),
        Peer("int4", [sys.executable, "ours", str(arguments.checkpoint), "int4"]),
    ]
    try:
        results = []
        for case in [*CASES, *([] if arguments.short else LONG_CASES)]:
            for compared in (peers, in_4_bits):
                results.append(compare(compared, case, arguments.rounds if case["positions"] < 8000 else 1))
                print(_line(results[-1]), flush=True)
        if arguments.xai:
            # Its code takes as many groups as its mesh has parts.
            whole = arguments.checkpoint.with_name(f"{arguments.checkpoint.name}-whole")
            make_checkpoint(whole, groups=1)
            original = Peer("xAI", [arguments.xai_python, "xai", str(whole), arguments.xai])
            peers.append(original)
            for case in (CASES[0], CASES[-1]):
                results.append(compare([original, *peers[1:3]], case, 1))
                print(_line(results[-1]), flush=True)
        peak = matmul_peak()
        print(f"float32 matrix product: {peak / 1e9:.0f} GFLOP/s")
    finally:
        for peer in (*peers, *in_4_bits):
            peer.close()
    if arguments.output:
        shown = {"machine": platform.processor() or platform.machine(), "results": results, "matmul": peak}
        arguments.output.write_text(json.dumps(shown, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
