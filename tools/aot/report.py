"""Asks the compiler, in a process of its own, what a program of the whole model takes."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys

from tools.aot.hlo import Traffic
from workers.capacity.hardware import Hardware
from workers.capacity.memory import Precision
from workers.model.config import GrokConfig

#: A compiler that takes longer hangs.
SECONDS = 1800
#: How the process says that there is no compiler.
NO_COMPILER = 3


class NoCompilerError(RuntimeError):
    """The platform's compiler is not installed."""


@dataclasses.dataclass(frozen=True)
class Engine:
    """Sizes of the programs; see `workers.messages.plan.EngineShape`. `pages` are those of a group."""

    slots: int
    pages: int
    page_size: int
    chunk: int
    context: int


@dataclasses.dataclass(frozen=True)
class AotReport:
    """What the compiler says of one program on one device; bytes.

    Attributes:
      program: `decode`, `prefill`, `score`, or `verify`, which TPUs do not have.
      fits: whether it could be compiled for the memory that there is.
      problem: why not.
      arguments: parameters and state.
      temporaries: beside them.
      peak: most at any time.
      collectives: by kind, the traffic of a run; what is in the loop over layers counts once.
      weight_copies: buffers as large as a weight that a run makes, beside the pages, which it changes in place.
      seconds: that it took to compile.
      versions: of jax and the compiler.
    """

    program: str
    fits: bool
    problem: str = ""
    arguments: int = 0
    temporaries: int = 0
    peak: int = 0
    collectives: dict[str, Traffic] = dataclasses.field(default_factory=dict)
    weight_copies: dict[str, int] = dataclasses.field(default_factory=dict)
    seconds: float = 0.0
    versions: str = ""


def compile_in_subprocess(
    config: GrokConfig,
    hardware: Hardware,
    mesh: tuple[int, int, str],
    precision: Precision,
    program: str,
    engine: Engine,
) -> AotReport:
    """Compiles a program on a mesh (data, model, rules). A compiler that dies says by it that the program does not fit.

    Raises NoCompilerError.
    """
    asked = {
        "model": dataclasses.asdict(config),
        "topology": str(hardware) if hardware.topology else None,
        "gpus": f"{hardware.devices // hardware.hosts}x{hardware.device.name}",
        "hosts": hardware.hosts,
        "mesh": mesh,
        "precision": dataclasses.asdict(precision),
        "program": program,
        "engine": dataclasses.asdict(engine),
    }
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "TPU_SKIP_MDS_QUERY": "1"}
    try:
        done = subprocess.run(
            [sys.executable, "-m", "tools.aot.compile"],
            input=json.dumps(asked), env=environment, capture_output=True, text=True, timeout=SECONDS, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return AotReport(program, False, f"the compiler has not ended after {SECONDS} s")
    if done.returncode == 0:
        told = json.loads(done.stdout.splitlines()[-1])
        told["collectives"] = {name: Traffic(**traffic) for name, traffic in told["collectives"].items()}
        return AotReport(**told)
    last = (done.stderr.strip().splitlines() or ["nothing said"])[-1]
    if done.returncode == NO_COMPILER:
        raise NoCompilerError(last)
    return AotReport(program, False, f"the compiler ended with code {done.returncode}: {last[:200]}")
