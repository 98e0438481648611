"""`grokmesh plan`. Without JAX."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import pathlib

from tools.aot.report import AotReport, Engine, NoCompilerError, compile_in_subprocess
from workers.capacity import hardware as hw
from workers.capacity.hardware import GIB
from workers.capacity.memory import Precision
from workers.capacity.planner import CHUNK, PAGE_SIZE, CapacityPlan, DoesNotFitError, Workload, plan
from workers.capacity.report import as_json, describe
from workers.checkpoint.checkpoint import open_checkpoint
from workers.checkpoint.storage import locate
from workers.messages.specs import KV_CACHES, WEIGHTS
from workers.model.config import GrokConfig

HELP = "say whether a model fits hardware, how fast, and on which mesh"
_DEMO = pathlib.Path(__file__).parents[2] / "models" / "demo"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", default="grok-1", help="grok-1, demo, or a checkpoint's directory or URL (default: %(default)s)"
    )
    kind = parser.add_mutually_exclusive_group(required=True)
    kind.add_argument("--topology", help="TPU slice, such as v6e:4x4")
    kind.add_argument("--gpus", help="GPUs of each host, such as 8xH100")
    kind.add_argument(
        "--cpu",
        metavar="GB,GB/S,GFLOP/S",
        help="each host's memory, its bandwidth, and what its kernels compute, such as 512,300,4000",
    )
    parser.add_argument("--hosts", type=int, default=1, help="of GPUs or CPUs (default: %(default)s)")
    parser.add_argument("--context", type=int, help="longest sequence (default: the model's)")
    parser.add_argument(
        "--concurrency", type=int, default=8, help="sequences that decode together (default: %(default)s)"
    )
    parser.add_argument("--weights", choices=WEIGHTS, default="int8", help="as kept on devices (default: %(default)s)")
    parser.add_argument("--kv-cache", choices=KV_CACHES, default="bfloat16", help="type (default: %(default)s)")
    parser.add_argument("--step-ms", type=float, help="longest that a step of all of them should take")
    parser.add_argument(
        "--price", type=float, help="of a device and hour, in any currency; shows that of a million tokens"
    )
    parser.add_argument("--json", action="store_true", help="figures instead of text")
    parser.add_argument("--compile", action="store_true", help="have the real programs compiled for it too")


def run(arguments: argparse.Namespace) -> int:
    """`grokmesh plan`. Exit code 1 if the model does not fit. Raises HardwareError, CheckpointError, ConfigError."""
    model = _model(arguments.model)
    hardware = _asked_hardware(arguments)
    activations = "float32" if hardware.device.platform == "cpu" else "bfloat16"
    precision = Precision(arguments.weights, activations, arguments.kv_cache)
    context = arguments.context or model.sequence_len
    if not 0 < context <= model.sequence_len:
        raise hw.HardwareError(f"--context {context}: the model has 1 to {model.sequence_len} positions")
    if arguments.concurrency < 1:
        raise hw.HardwareError(f"--concurrency {arguments.concurrency}: at least 1")
    if arguments.price is not None and not 0 < arguments.price < math.inf:
        raise hw.HardwareError(f"--price {arguments.price:g}: of a device and hour, more than 0")
    wanted = arguments.step_ms / 1e3 if arguments.step_ms is not None else None
    try:
        found = plan(model, hardware, precision, Workload(context, arguments.concurrency, wanted))
    except DoesNotFitError as error:
        print(json.dumps({"fits": False, "reason": str(error)}) if arguments.json else f"No: {error}")
        return 1
    reports = _compiled(found) if arguments.compile else []
    if arguments.json:
        shown = {"fits": True, **as_json(found, arguments.price)}
        if arguments.compile:
            shown["compiled"] = [dataclasses.asdict(report) for report in reports]
        print(json.dumps(shown, indent=1))
    else:
        print(describe(found, arguments.price))
        print("\n".join(line for report in reports for line in _report_lines(found, report)))
    return 0 if all(report.fits for report in reports) else 1


def _model(name: str) -> GrokConfig:
    if name == "grok-1":
        return GrokConfig()
    return open_checkpoint(_DEMO if name == "demo" else locate(name)).config


def _asked_hardware(arguments: argparse.Namespace) -> hw.Hardware:
    if arguments.hosts < 1:
        raise hw.HardwareError(f"--hosts {arguments.hosts}: at least 1")
    if arguments.topology:
        return hw.tpu_slice(arguments.topology)
    if arguments.gpus:
        return hw.gpu_hosts(arguments.gpus, arguments.hosts)
    try:
        memory, bandwidth, flops = (float(part) * 1e9 for part in arguments.cpu.split(","))
        if not min(memory, bandwidth, flops) > 0:
            raise ValueError
    except ValueError:
        raise hw.HardwareError(f"--cpu {arguments.cpu}: expected three numbers, such as 512,300,4000") from None
    return hw.cpu_hosts(memory, bandwidth, flops, arguments.hosts)


def _compiled(found: CapacityPlan) -> list[AotReport]:
    if found.hardware.device.platform == "cpu":
        raise hw.HardwareError("--compile: for TPU slices and H100s; CPU hosts compile when they start")
    best, context = found.best, found.workload.context
    mesh = (best.data, best.model, best.rules)
    engine = Engine(best.slots, best.pages, PAGE_SIZE, CHUNK, context)
    try:
        return [
            compile_in_subprocess(found.config, found.hardware, mesh, found.precision, program, engine)
            for program in ("decode", "prefill")
        ]
    except NoCompilerError as error:
        raise hw.HardwareError(f"--compile: {error}") from error


def _report_lines(found: CapacityPlan, report: AotReport) -> list[str]:
    lines = [f"What does the compiler say of {report.program}? ({report.versions}, {report.seconds:.0f} s)", ""]
    if not report.peak:
        return [*lines, f"  -> no: {report.problem}", ""]
    memory = found.hardware.device.memory
    lines += [
        f"  arguments {report.arguments / GIB:.2f} GiB, temporaries {report.temporaries / 2**20:.0f} MiB, "
        f"peak {report.peak / GIB:.2f} of {memory / GIB:.2f} GiB; planned were {found.best.memory.total / GIB:.2f}",
        *(
            f"  {name}: {traffic.count} a layer or step, largest {traffic.largest / 1e6:.2f} MB, "
            f"{traffic.total / 1e6:.2f} MB in all"
            for name, traffic in report.collectives.items()
        ),
        f"  buffers as large as a weight: {', '.join(report.weight_copies) or 'none'}",
        f"  -> {'it fits' if report.fits else 'it does not fit'}.",
        "",
    ]
    return lines
