"""What of an engine's programs crosses between CPU devices: only what the model says, none of it by XLA's collectives."""

from __future__ import annotations

import re

import jax
import pytest

from tests.conftest import GOLDEN
from workers.checkpoint.checkpoint import open_checkpoint
from workers.checkpoint.loader import parameter_shapes
from workers.kernels.cpu.kernels import native_kernels
from workers.messages.plan import EngineShape
from workers.model.partition import Partition
from workers.runtime.mesh import abstract_mesh
from workers.runtime.program_set import ProgramSet

CHECKPOINT = open_checkpoint(GOLDEN / "text-s1")
#: Of each program, in a layer and besides: two sums a layer; with split batches their rows, too. One exchange for the
#: embedding, one for the logits, one for what was drawn.
EXPECTED = {
    (1, 2, "tensor"): (["sum"] * 2, ["exchange", "gather", "sum"]),
    (1, 4, "tensor"): (["sum"] * 2, ["exchange", "gather", "sum"]),
    (2, 2, "batch"): (["gather", "sum", "sum"], ["exchange", "gather", "gather", "sum"]),
}


@pytest.mark.parametrize("mesh", EXPECTED)
@pytest.mark.parametrize("name", ["prefill", "score", "decode", "verify"])
def test_only_what_the_model_says_crosses_between_devices(mesh: tuple[int, int, str], name: str) -> None:
    data, model, rules = mesh
    partition = Partition.create(CHECKPOINT.config, abstract_mesh(data, model), rules, native_kernels())
    shape = EngineShape(8, partition.batch_groups, 40, 8, 16, 96, True)
    program_set = ProgramSet(CHECKPOINT.config, shape, partition, parameter_shapes(CHECKPOINT, partition))
    lowered = program_set.trace(name).lower(lowering_platforms=("cpu",))
    text = lowered.compile(device_assignment=tuple(jax.devices()[: data * model])).as_text()
    assert not re.findall(r"(?:all-gather|all-reduce|all-to-all|collective-\w+|reduce-scatter)[\w-]*\(", text)
    entry = text[text.index("ENTRY") :]
    layer = text.removesuffix(entry)
    in_a_layer, besides = EXPECTED[mesh]
    if name == "score":  # some positions at a time, in a loop, and then the last one
        in_a_layer = sorted([*in_a_layer, *(crossing for crossing in besides if crossing != "sum")])
    assert (_crossings(layer), _crossings(entry)) == (in_a_layer, besides)


def _crossings(text: str) -> list[str]:
    return sorted(re.findall(r'custom_call_target="grokmesh_(sum|gather|exchange)"', text))
