"""`grokmesh verify`: runs a golden set's cases on a mesh, in one process or several, through the serving programs."""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from tools.verify import options
from tools.verify.golden import (
    BFLOAT16,
    FLOAT32,
    NATIVE,
    Array,
    GoldenError,
    GoldenSet,
    Rounding,
    Verdict,
    flip_bounds,
    judge_checkpoint,
    judge_flips,
    judge_forward,
    judge_run,
    router_gaps,
)
from workers.checkpoint.errors import CheckpointError
from workers.engine.scheduler import Scheduler
from workers.host.streams import free_port
from workers.host.worker import Worker
from workers.kernels.interface import PORTABLE
from workers.messages.plan import Chunk, Plan, Sampling, SlotStart
from workers.messages.request import Refused, Request
from workers.messages.specs import EngineSpec, MeshSpec, ModelSpec, RankSpec
from workers.model.config import ConfigError
from workers.runtime.runtime import Runtime

#: Sizes of the engine that runs the cases. Small, so that prompts span chunks and pages.
_SLOTS, _PAGE, _CHUNK = 8, 16, 32


def main() -> int:
    """Exit code 0 if every case is within tolerance, 1 if not, 2 if the set can't be run."""
    parser = argparse.ArgumentParser(prog="grokmesh verify")
    options.add_arguments(parser)
    parser.add_argument("--rank", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--coordinator", default="", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    shape = re.fullmatch(r"(\d+)x(\d+)", arguments.mesh)
    if not shape or "0" in shape.groups() or arguments.hosts < 1 or int(shape[1]) * int(shape[2]) % arguments.hosts:
        parser.error(f"--mesh {arguments.mesh} is no DATAxMODEL of which --hosts {arguments.hosts} have equal parts")
    data, model = int(shape[1]), int(shape[2])
    arguments.coordinator = arguments.coordinator or f"127.0.0.1:{free_port('127.0.0.1')}"
    others = _start_others(arguments) if arguments.rank == 0 else []
    try:
        golden = GoldenSet.load(arguments.golden)
        worker = _worker(arguments, data, model)
        worker.form()
        worker.warm_up()
        verdicts = _verdicts(golden, arguments, worker)
        if arguments.rank:
            list(verdicts)
            return 0
        print(
            f"{arguments.golden} on mesh {arguments.mesh}, {arguments.hosts} host(s), {arguments.activations} activations"
        )
        return _report(verdicts)
    except (GoldenError, CheckpointError, ConfigError, ValueError, KeyError, OSError, Refused) as error:
        print(f"grokmesh: {error}", file=sys.stderr)
        for process in others:
            process.kill()
        return 2


def _verdicts(golden: GoldenSet, arguments: argparse.Namespace, worker: Worker) -> Iterable[Verdict]:
    """Runs all cases; every rank must exhaust this."""
    runtime, config = worker.runtime, worker.runtime.config
    checksums = judge_checkpoint(golden, arguments.checkpoint)
    if checksums:
        yield checksums
    rounding = _rounding(arguments, runtime.kernels)
    for case in golden.forward:
        logits, probabilities = score(runtime, case["prompt"])
        yield judge_forward(golden, case, logits, probabilities, config.num_selected_experts, rounding)
    greedy = [case for case in golden.run if case["kind"] == "greedy"]
    scheduler = Scheduler(runtime.shape, config.vocab_size, len(greedy))
    drawn = _generate(runtime, scheduler, greedy)
    for case in golden.run:
        if case["kind"] not in ("greedy", "sample"):
            continue  # what the original did with prompts that it cut or masked is not to be imitated
        tokens = golden.array(golden.reference, f"run/{case['name']}/tokens").tolist()
        prompt = list(case["prompt"])
        logits, probabilities = score(runtime, [*prompt, *tokens[:-1]])
        gaps = router_gaps(probabilities, config.num_selected_experts).min(axis=1)
        yield judge_run(golden, case, drawn.get(case["name"]), logits[len(prompt) - 1 :], gaps)


def _rounding(arguments: argparse.Namespace, kernels: str) -> Rounding:
    """That of the activations, of the kernels, and of weights that are not those of the original."""
    if arguments.activations != "float32" or arguments.weights in ("int8-unrounded", "int4"):
        return BFLOAT16
    return FLOAT32 if kernels == PORTABLE.name else NATIVE


def score(runtime: Runtime, prompt: list[int]) -> tuple[Array, Array]:
    """Logits [T, V] and router probabilities [T, L, E] of a whole prompt, computed chunk by chunk."""
    pages = tuple(range(1, 1 + runtime.shape.pages_for(len(prompt))))
    results = []
    for start in range(0, len(prompt), _CHUNK):
        starts = (SlotStart(0, pages, Sampling()),) if start == 0 else ()
        chunk = Chunk(0, start, tuple(prompt[start : start + _CHUNK]), last=False)
        results.append(runtime.logits(Plan(0, starts, ((chunk,),), ())))
    logits, probabilities = zip(*results, strict=True)
    return np.concatenate(logits), np.concatenate(probabilities)


def _generate(runtime: Runtime, scheduler: Scheduler, cases: list[Mapping[str, Any]]) -> dict[str, list[int]]:
    """Greedy tokens of all cases, batched together as the service would. The same on every rank, without a leader:
    schedulers that get the same tokens make the same plans."""
    tokens: dict[str, list[int]] = {case["name"]: [] for case in cases}
    for case in cases:
        scheduler.submit(Request(case["name"], tuple(case["prompt"]), case["max_len"], Sampling()))
    while (plan := scheduler.plan()) is not None:
        for event in scheduler.complete(runtime.read(runtime.execute(plan))):
            tokens[event.request_id].append(event.token.id)
    return tokens


def _report(verdicts: Iterable[Verdict]) -> int:
    done = []
    print(f"{'case':<34} {'judged':>6} {'max error':>10} {'rms error':>10} {'argmax':>7} {'tokens':>7}")
    for v in verdicts:
        tokens = "-" if v.tokens is None else f"{v.tokens:.1%}"
        print(f"{v.case:<34} {v.judged:>6} {v.worst:>10.2e} {v.rms:>10.2e} {v.argmax:>7.1%} {tokens:>7}  {_result(v)}")
        done.append(v)
    flips = judge_flips(done)
    counts = ", ".join(f"{what} {n} (at most {most})" for what, (n, most) in flip_bounds(flips.tally).items())
    print(f"of {flips.judged} positions that a hair decides: {counts}  {_result(flips)}")
    passed = not any(v.problems for v in (*done, flips))
    print("within tolerance" if passed else "NOT within tolerance")
    return 0 if passed else 1


def _result(verdict: Verdict) -> str:
    return "FAIL: " + "; ".join(verdict.problems) if verdict.problems else "ok"


def _worker(arguments: argparse.Namespace, data: int, model: int) -> Worker:
    return Worker(
        RankSpec(
            replica=0,
            epoch=1,
            secret=b"",
            rank=arguments.rank,
            coordinator=arguments.coordinator,
            leader="",
            model=ModelSpec("verify", str(arguments.checkpoint), arguments.weights, arguments.activations),
            mesh=MeshSpec(
                arguments.platform, arguments.hosts, data * model // arguments.hosts, data, model, arguments.rules
            ),
            engine=EngineSpec(_SLOTS * data, _PAGE, _CHUNK, None, None, 0),
            compilation_cache=None,
        )
    )


def _start_others(arguments: argparse.Namespace) -> list[subprocess.Popen[bytes]]:
    """Starts ranks 1 and on; they are silent, since rank 0 says the same, and end with it."""
    command = [sys.executable, "-P", "-m", "tools.verify.verify"]
    for name in ("checkpoint", "golden", "mesh", "hosts", "rules", "weights", "activations", "platform", "coordinator"):
        command += [f"--{name}", str(getattr(arguments, name))]
    return [
        subprocess.Popen([*command, "--rank", str(rank)], stderr=subprocess.DEVNULL)
        for rank in range(1, arguments.hosts)
    ]


if __name__ == "__main__":
    sys.exit(main())
