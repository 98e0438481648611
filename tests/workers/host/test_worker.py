"""One host's life in an epoch, in a process of its own, as JAX can be set up only once."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.conftest import GOLDEN
from workers.messages.specs import JOINING, PREPARING, WARMING_UP

pytestmark = pytest.mark.slow

PROGRAM = """
import json, logging, sys
from workers.host.worker import Worker
from workers.messages.specs import COMPILING, EngineSpec, MeshSpec, ModelSpec, RankSpec

phases = []
logging.getLogger("workers.host.worker").setLevel(logging.INFO)
logging.getLogger("workers.host.worker").addHandler(
    type("Phases", (logging.Handler,), {"emit": lambda _, record: phases.append(record.getMessage())})()
)
checkpoint, devices, data = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
mesh = MeshSpec(sys.argv[4], 1, devices, data, 1, "tensor")
engine = EngineSpec(slots=2, page_size=8, prefill_chunk=16, context=64)
worker = Worker(RankSpec(0, 3, b"s", 0, "", "", ModelSpec("m", checkpoint, "int8", "float32"), mesh, engine, None))
try:
    digests = worker.form()
    formed = worker.progress
    worker.warm_up()
    taken = [phase for phase in phases if not phase.startswith((COMPILING, "kernels"))]
    print(json.dumps({
        "phases": taken, "digests": len(digests), "devices": formed.devices, "read": formed.bytes_read,
        "total": formed.bytes_total, "ready": worker.progress.phase, "late": worker._compilations_while_serving(),
        "tokens": worker.runtime.device_bytes["kv_pages"] > 0,
    }))
except Exception as error:
    print(json.dumps({"error": f"{type(error).__name__}: {error}"}))
"""


def _run(checkpoint: str, devices: int, data: int, platform: str = "cpu") -> dict[str, object]:
    arguments = [sys.executable, "-c", PROGRAM, checkpoint, str(devices), str(data), platform]
    done = subprocess.run(arguments, capture_output=True, text=True, check=True)
    found: dict[str, object] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_a_host_goes_through_its_phases_and_then_compiles_nothing_more() -> None:
    found = _run(str(GOLDEN / "nano-s1"), 2, 2)
    assert found["phases"] == [PREPARING, JOINING, "compiled", WARMING_UP, "ready"]
    assert found["ready"] == "ready"
    assert found["devices"] == 2
    assert found["read"] == found["total"] > 0  # type: ignore[operator]
    assert found["digests"] > 0  # type: ignore[operator]
    assert found["late"] == 0


@pytest.mark.parametrize(
    ("checkpoint", "devices", "data", "problem"),
    [
        (str(GOLDEN / "nano-s1"), 1, 2, "ValueError: a mesh of 2 x 1 needs 2 devices; 1 are there"),
        ("/nowhere", 1, 1, "CheckpointError: /nowhere/ckpt-0"),
    ],
    ids=["mesh", "checkpoint"],
)
def test_what_does_not_fit_is_named(checkpoint: str, devices: int, data: int, problem: str) -> None:
    assert str(_run(checkpoint, devices, data)["error"]).startswith(problem)


@pytest.mark.parametrize(("platform", "backend"), [("gpu", "CUDA"), ("tpu", "tpu")])
def test_a_host_without_the_accelerators_that_it_should_have_says_so(platform: str, backend: str) -> None:
    """And not that a mesh needs more devices than its processor is."""
    found = _run(str(GOLDEN / "nano-s1"), 8, 1, platform)
    assert backend in str(found["error"])
    assert "devices; 1 are there" not in str(found["error"])
