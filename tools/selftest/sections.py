"""Runs the sections of a self-test on this host, one process after the other. Without JAX.

A section that breaks its device takes no other with it.
"""

from __future__ import annotations

import collections
import dataclasses
import os
import pathlib
import subprocess
import sys
from collections.abc import Iterator, Sequence

from tools.selftest.findings import Finding, Outcome
from workers.host.environment import share_devices

GOLDEN = pathlib.Path(__file__).parents[2] / "tests" / "golden"
SECTIONS = ("host", "kernels", "golden", "layers", "loading")
#: The variable with what processes of several hosts prove to know when they connect.
SECRET = "GROKMESH_SELFTEST_SECRET"
#: How the chips of a host lie, by their number.
_TPU_HOSTS = {1: "1,1,1", 4: "2,2,1", 8: "2,4,1"}
_DEVICE_FILES = {"nvidia[0-9]*": "gpu", "accel[0-9]*": "tpu", "vfio/[0-9]*": "tpu"}
#: Seconds that a section may take: programs of accelerators compile for minutes.
_SECTION_SECONDS = 600


@dataclasses.dataclass(frozen=True)
class Options:
    """What is to be tested.

    Attributes:
      platform: of the devices, cpu, gpu or tpu.
      devices: parts into which a CPU host is divided. Of accelerators the memory of each is measured, sums and golden sets take
        all, and kernels and layers the first.
      checkpoint: directory or URL from which the rate of loading is measured; None for none.
      golden: directory with golden sets.
      only: which sections.
      config: config.json of the model of which layers are computed; None for Grok-1.
    """

    platform: str
    devices: int = 1
    checkpoint: str | None = None
    golden: str = str(GOLDEN)
    config: str | None = None
    only: Sequence[str] = SECTIONS


def platform_here() -> str:
    """The platform of this host's devices, as their drivers show it."""
    found = {platform for pattern, platform in _DEVICE_FILES.items() if any(pathlib.Path("/dev").glob(pattern))}
    return next((platform for platform in ("gpu", "tpu") if platform in found), "cpu")


def run_sections(options: Options) -> Iterator[Finding]:
    """All that one host can find out by itself."""
    environment, devices = _alone(options), options.devices
    # Golden sets are computed on all devices, and only JAX knows how many accelerators there are.
    if "host" in options.only or ("golden" in options.only and options.platform != "cpu"):
        for finding in _run("host", ["tools.selftest.host"], environment):
            devices = int(finding.figures.get("devices", devices))
            yield finding
    if "kernels" in options.only:
        yield from _run("kernels", ["tools.selftest.kernels"], environment)
    if "golden" in options.only:
        yield from _golden(options, devices, environment)
    if "layers" in options.only:
        words = [options.config] if options.config else []
        yield from _run("layers", ["tools.selftest.layers", *words], environment)
    if "loading" not in options.only:
        return
    if options.checkpoint is None:
        yield Finding("loading", "rate", Outcome.SKIPPED, "name a directory or URL with --checkpoint")
    else:
        yield from _run("loading", ["tools.selftest.loading", options.checkpoint], environment)


def environment_of(options: Options) -> dict[str, str]:
    """For processes that use this host's devices."""
    environment = dict(os.environ)
    share_devices(options.platform, environment)
    environment["JAX_TRACEBACK_FILTERING"] = "off"  # so that an error is the last line
    environment["JAX_PLATFORMS"] = {"gpu": "cuda"}.get(options.platform, options.platform)
    if options.platform == "cpu":
        environment["JAX_NUM_CPU_DEVICES"] = str(options.devices)
    return environment


def _alone(options: Options) -> dict[str, str]:
    """For processes that use this host's devices without those of others."""
    environment = environment_of(options)
    chips = len(list(pathlib.Path("/dev").glob("accel[0-9]*")) or list(pathlib.Path("/dev/vfio").glob("[0-9]*")))
    if options.platform == "tpu" and chips in _TPU_HOSTS:
        # Else all hosts of a slice wait for each other.
        environment |= {"TPU_HOST_BOUNDS": "1,1,1", "TPU_CHIPS_PER_HOST_BOUNDS": _TPU_HOSTS[chips]}
    return environment


def run_interconnect(options: Options, coordinator: str, secret: str, rank: int, hosts: int) -> list[Finding]:
    """What the devices of several hosts find out together; all must call this alike. Rank 0 says it, the others what fails."""
    words = ["--coordinator", coordinator, "--rank", str(rank), "--hosts", str(hosts)]
    environment = environment_of(options) | {SECRET: secret}
    return list(_run("interconnect", ["tools.selftest.host", *words], environment))


def _golden(options: Options, devices: int, environment: dict[str, str]) -> Iterator[Finding]:
    """What xAI's own code has computed, on all devices."""
    sets = sorted(path.parent for path in pathlib.Path(options.golden).glob("*/cases.json"))
    if not sets:
        yield Finding(
            "golden",
            "sets",
            Outcome.SKIPPED,
            f"none in {options.golden}; a clone of the project has them in tests/golden",
        )
    activations = "float32" if options.platform == "cpu" else "bfloat16"
    for directory in sets:
        words = ["--checkpoint", str(directory), "--golden", str(directory), "--platform", options.platform]
        module = ["tools.verify.verify", *words, "--activations", activations, "--mesh", f"1x{devices}"]
        code, lines = _lines(module, environment)
        text = lines[-1] if lines else ""
        yield Finding("golden", directory.name, Outcome.FAILED if code else Outcome.OK, text)


def _run(section: str, module: Sequence[str], environment: dict[str, str]) -> Iterator[Finding]:
    code, lines = _lines(module, environment)
    yield from (finding for line in lines if (finding := Finding.said(line)) is not None)
    if code:
        last = " | ".join([line for line in lines if line.strip() and Finding.said(line) is None][-2:])
        yield Finding(section, "ends", Outcome.FAILED, f"code {code}: {last[-300:]}")


def _lines(module: Sequence[str], environment: dict[str, str]) -> tuple[int, list[str]]:
    """Exit code and last lines of a module that runs in a process of its own."""
    command = [sys.executable, "-P", "-m", *module]
    try:
        done = subprocess.run(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            timeout=_SECTION_SECONDS, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        found = error.stdout.decode(errors="replace").splitlines() if isinstance(error.stdout, bytes) else []
        return 124, [*found, f"it has not ended in {_SECTION_SECONDS} s"]
    return done.returncode, list(collections.deque(done.stdout.splitlines(), 1000))
