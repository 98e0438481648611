"""Computes a plan log again in this one process, and compares the tokens: `python -m tools.replay FILE`.

A leader writes the log, with `telemetry.plan_log`. All devices of its mesh are CPU devices of this process. With the kernels of
the log the tokens are the same bits, unless something is wrong: then the first plan that differs is printed.
"""

from __future__ import annotations

import argparse
import dataclasses
import pathlib
import sys

from workers.checkpoint.loader import load_parameters
from workers.host.plan_log import LoggedEngine, read_log
from workers.host.standby import StandbyEngine
from workers.kernels.cpu.kernels import use_instruction_set
from workers.kernels.interface import PORTABLE
from workers.messages.plan import StepTokens
from workers.model.partition import Partition
from workers.runtime.mesh import make_mesh
from workers.runtime.runtime import Runtime


def main() -> int:
    """Exit code 0 if all tokens are those of the log, 1 if not, 2 for no log."""
    parser = argparse.ArgumentParser(prog="python -m tools.replay", description=__doc__)
    parser.add_argument("file", type=pathlib.Path)
    parser.add_argument("--checkpoint", help="where the model lies here, if not where it lay for the log's service")
    arguments = parser.parse_args()
    with arguments.file.open("rb") as file:
        entries = read_log(file)
        first = next(entries, None)
        if first is None or first.engine is None:
            print(f"{arguments.file}: no plan log; see telemetry.plan_log", file=sys.stderr)
            return 2
        runtime = _runtime(first.engine, arguments.checkpoint)
        computed: dict[int, StepTokens] = {}
        plans = 0
        for entry in entries:
            if entry.plan is not None:
                if entry.plan.drafts and not runtime.shape.batch_invariant:
                    print(
                        f"plan {entry.plan.number} has guesses, which these kernels can't verify: go on where the log's own are"
                    )
                    return 2
                computed[entry.plan.number] = runtime.read(runtime.execute(entry.plan))
            elif entry.tokens is not None:
                plans += 1
                own = computed.pop(entry.tokens.number)
                if own != entry.tokens:
                    print(f"plan {own.number} differs:\n  logged   {entry.tokens}\n  computed {own}")
                    return 1
    print(f"{plans} plans came to the same tokens; {len(computed)} had no tokens in the log")
    return 0


def _runtime(logged: LoggedEngine, checkpoint: str | None) -> Runtime:
    """The log's engine, on devices of this process."""
    mesh = dataclasses.replace(
        logged.mesh, platform="cpu", hosts=1, devices_per_host=logged.mesh.data * logged.mesh.model
    )
    model = dataclasses.replace(logged.model, checkpoint=checkpoint or logged.model.checkpoint)
    use_instruction_set(logged.kernels)
    standby = StandbyEngine(model, mesh, logged.engine)
    if logged.kernels == PORTABLE.name:
        standby.adopt(PORTABLE)
    if standby.kernels.name != logged.kernels:
        print(f"computing with {standby.kernels.name} kernels, not with {logged.kernels}: bits may differ")
    partition = Partition.create(
        standby.checkpoint.config, make_mesh(mesh.data, mesh.model), mesh.rules, standby.kernels
    )
    runtime = Runtime(standby.program_set, partition)
    parameters, _ = load_parameters(standby.checkpoint, partition, weights=model.weights, dtype=standby.dtype)
    runtime.set_parameters(parameters)
    runtime.warm_up()
    return runtime


if __name__ == "__main__":
    sys.exit(main())
