"""Compiles the full-size model for every topology and batch of the support matrix, and writes docs/support-matrix.md.

Run by `make aot` in an environment that has the compilers of TPUs and GPUs.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import datetime
import json
import pathlib
import sys

from tools.aot.report import AotReport, Engine, compile_in_subprocess
from workers.capacity.hardware import GIB, Hardware, gpu_hosts, tpu_slice
from workers.capacity.memory import Memory, Precision, memory
from workers.capacity.planner import CHUNK, PAGE_SIZE, layout_of, meshes
from workers.model.config import GrokConfig

HARDWARE = (
    *(tpu_slice(name) for name in ("v5e:4x8", "v5e:8x8", "v5p:2x2x2", "v6e:4x4", "v4:2x2x4")),
    gpu_hosts("8xH100", 1),
    gpu_hosts("8xH100", 2),
)
BATCHES = (1, 8, 32, 64, 128)
CONFIG = GrokConfig()
TARGET = pathlib.Path("docs/support-matrix.md")
#: All that the compilers said.
RAW = pathlib.Path("build/aot/matrix.json")
#: Compilers at a time.
PROCESSES = 2


@dataclasses.dataclass(frozen=True)
class Row:
    """A topology, a batch, a precision, a program; what the planner says of it."""

    hardware: Hardware
    mesh: tuple[int, int, str]
    precision: Precision
    program: str
    engine: Engine
    planned: Memory


def rows() -> list[Row]:
    """All rows: decoding at each batch, rounded up to the batch groups; prompts, scores and guesses beside 8 sequences."""
    made = []
    for hardware in HARDWARE:
        mesh = max(meshes(CONFIG, hardware.devices), key=lambda mesh: (mesh[2] == "tensor", mesh[1]))
        layout = layout_of(CONFIG, *mesh)
        groups = layout.batch_groups
        cases = [("decode", batch, Precision()) for batch in BATCHES]
        cases += [("prefill", 8, Precision()), ("score", 8, Precision())]
        if hardware.device.platform == "gpu":
            cases += [("verify", 8, Precision())]
        cases += [("decode", 8, Precision(kv_cache="int8"))]
        if hardware.device.platform == "tpu":
            cases += [("decode", 8, Precision(weights="int4"))]
        for program, batch, precision in cases:
            slots = -(-batch // groups) * groups
            pages = slots // groups * -(-CONFIG.sequence_len // PAGE_SIZE) + 1
            engine = Engine(slots, pages, PAGE_SIZE, CHUNK, CONFIG.sequence_len)
            planned = memory(
                CONFIG, layout, precision, hardware.device.platform,
                slots=slots, pages=pages, page_size=PAGE_SIZE, chunk=CHUNK, program=program,
            )  # fmt: skip
            made.append(Row(hardware, mesh, precision, program, engine, planned))
    return made


def main() -> int:
    """Writes the table; fails if the planner and a compiler are further apart than three in a hundred."""
    asked = rows()

    def ask(row: Row) -> AotReport:
        report = compile_in_subprocess(CONFIG, row.hardware, row.mesh, row.precision, row.program, row.engine)
        print(_cells(row, report), flush=True)
        return report

    with concurrent.futures.ThreadPoolExecutor(PROCESSES) as pool:
        found = list(zip(asked, pool.map(ask, asked), strict=True))
    TARGET.write_text(_page(found))
    RAW.parent.mkdir(parents=True, exist_ok=True)
    RAW.write_text(json.dumps([{"row": _cells(row, w), **dataclasses.asdict(w)} for row, w in found], indent=1))
    worst = max(abs(_error(row, report)) for row, report in found if report.peak)
    surprises = [
        _cells(row, report) for row, report in found if report.fits != (row.planned.total <= row.hardware.device.memory)
    ]
    print(f"{TARGET}: {len(found)} rows, the planner is off by at most {worst:.1%}", *surprises, sep="\n")
    return 0 if worst <= 0.03 and not surprises else 1


def _error(row: Row, report: AotReport) -> float:
    return row.planned.total / report.peak - 1


def _cells(row: Row, report: AotReport) -> str:
    weights, cache = row.precision.weights, row.precision.kv_cache
    data, model, rules = row.mesh
    known = [str(row.hardware), f"{data} x {model} {rules}", f"{weights}, {cache}", row.program, str(row.engine.slots)]
    if not report.peak:
        cells = ["", *known, "no", "", "", f"{row.planned.total / GIB:.2f}", "", "", report.problem[:80], "", ""]
        return " | ".join(cells).strip()
    largest = max((traffic.largest for traffic in report.collectives.values()), default=0)
    copies = ", ".join(f"{count} {what}" for what, count in report.weight_copies.items()) or "none"
    cells = [
        "", *known, "yes" if report.fits else "no", f"{report.peak / GIB:.2f}", f"{report.temporaries / 2**20:.0f}",
        f"{row.planned.total / GIB:.2f}", f"{_error(row, report):+.1%}", f"{largest / 1e6:.2f}", copies,
        f"{report.seconds:.0f}", "",
    ]  # fmt: skip
    return " | ".join(cells).strip()


def _page(found: list[tuple[Row, AotReport]]) -> str:
    versions = "; ".join(sorted({report.versions for _, report in found if report.versions}))
    head = ["hardware", "mesh", "weights, KV cache", "program", "sequences", "fits", "peak GiB", "temporaries MiB"]
    head += ["planned GiB", "planner's error", "largest collective MB", "weight-sized buffers", "seconds"]
    lines = [
        "# Support matrix",
        "",
        "The real programs of the whole model of 64 layers, compiled ahead of time for hardware that was not there: "
        f"{CONFIG.sequence_len} positions a sequence, every slot's pages allocated, {CHUNK} prompt positions a prefill. "
        f"Per device. Made by `make aot` on {datetime.date.today():%d %B %Y} with {versions}.",
        "",
        "*Peak* is the compiler's, *planned* what `grokmesh plan` says without it. Peak includes arguments (weights, pages, "
        "sampling). A collective within the loop over layers runs 64 times. *Weight-sized buffers* "
        "are arrays as large as one expert's part of a device that a run makes in its main memory. NVIDIA's compiler knows no "
        "limit of memory: whether it fits is the comparison with nine tenths of 80 GB.",
        "",
        f"| {' | '.join(head)} |",
        f"|{'---|' * len(head)}",
    ]
    return "\n".join([*lines, *(_cells(row, report) for row, report in found)]) + "\n"


if __name__ == "__main__":
    sys.exit(main())
