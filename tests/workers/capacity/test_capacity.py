"""The planner's arithmetic against published figures, against what is really allocated, and against compilers' witness."""

from __future__ import annotations

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh

from tests.conftest import DEMO, GOLDEN
from tools.aot import hlo
from workers.capacity.hardware import DEVICES, HardwareError, cpu_hosts, gpu_hosts, pod_type, tpu_slice
from workers.capacity.memory import Precision, kv_bytes_per_token, memory, whole_bytes
from workers.capacity.planner import DoesNotFitError, Workload, layout_of, meshes, pages_that_fit, plan
from workers.capacity.prediction import active_parameters, expected_experts, sum_seconds
from workers.capacity.report import as_json, configuration, describe
from workers.checkpoint.checkpoint import open_checkpoint
from workers.checkpoint.loader import load_parameters
from workers.kernels.cpu.kernels import native_kernels
from workers.kernels.interface import ACCELERATOR
from workers.messages.plan import EngineShape
from workers.model.config import GrokConfig
from workers.model.partition import Partition
from workers.runtime.mesh import AXES
from workers.runtime.program_set import ProgramSet
from workers.runtime.runtime import Runtime

pytestmark = pytest.mark.slow

GROK_1 = GrokConfig()
ONE_REQUEST = Workload(8192, 1)


def test_314_billion_parameters_take_what_everybody_says() -> None:
    nominal = {"float32": 1256, "bfloat16": 628, "int8": 314, "int4": 157}
    found = {name: whole_bytes(GROK_1, name) / 1e9 for name in nominal}
    assert found == pytest.approx(nominal, rel=0.01)  # the release has 315.7 billion
    assert kv_bytes_per_token(GROK_1, "bfloat16") == 256 * 1024


def test_the_shares_of_experts_are_the_published_ones() -> None:
    shares = {batch: expected_experts(GROK_1, batch) / 8 for batch in (1, 2, 4, 8, 16)}
    assert shares == pytest.approx({1: 0.25, 2: 0.44, 4: 0.68, 8: 0.90, 16: 0.99}, abs=0.005)
    assert active_parameters(GROK_1) / 1e9 == pytest.approx(83, abs=1)


@pytest.mark.parametrize(
    ("hardware", "weights", "fits"),
    [
        (gpu_hosts("8xH100", 1), "int8", True),
        (gpu_hosts("8xH100", 1), "bfloat16", False),
        (gpu_hosts("8xH100", 2), "bfloat16", True),
        (gpu_hosts("4xH100", 1), "int8", False),
        (tpu_slice("v5e:4x8"), "int8", True),
        (tpu_slice("v5e:4x4"), "int8", False),
        (tpu_slice("v5e:4x4"), "int4", True),
        (tpu_slice("v4:2x2x2"), "int8", False),
        (tpu_slice("v6e:2x4"), "int8", False),
        (cpu_hosts(512e9, 300e9, 4e12, 1), "int8", True),
        (cpu_hosts(256e9, 300e9, 4e12, 1), "int8", False),
        (cpu_hosts(256e9, 300e9, 4e12, 2), "int8", True),
    ],
    ids=str,
)
def test_what_runs_it(hardware: object, weights: str, fits: bool) -> None:
    precision = Precision(weights)
    if fits:
        found = plan(GROK_1, hardware, precision, ONE_REQUEST)  # type: ignore[arg-type]
        assert found.best.capacity >= 1
        assert found.free >= 0
        return
    with pytest.raises(DoesNotFitError, match=r"does not fit .* What would do: "):
        plan(GROK_1, hardware, precision, ONE_REQUEST)  # type: ignore[arg-type]


def test_hardware_that_does_not_exist_is_named_with_what_does() -> None:
    for wrong, known in (("v5e:4x4x4", "4x8"), ("v9:2x2", "v5p")):
        with pytest.raises(HardwareError, match=known):
            tpu_slice(wrong)
    with pytest.raises(HardwareError, match="H100"):
        gpu_hosts("8xH1000", 1)
    found = pod_type("v6e-16"), pod_type("v5p-16"), pod_type("v5litepod-32"), pod_type("x-1")
    assert [str(hardware) for hardware in found] == ["v6e:4x4", "v5p:2x2x2", "v5e:4x8", "None"]


@pytest.mark.parametrize(
    ("topology", "hosts", "devices"), [("v6e:2x4", 1, 8), ("v5e:2x2", 1, 4), ("v6e:4x4", 4, 16), ("v5p:2x2x2", 2, 8)]
)
def test_a_slice_has_the_hosts_that_ray_takes_it_for(topology: str, hosts: int, devices: int) -> None:
    found = tpu_slice(topology)
    assert (found.hosts, found.devices) == (hosts, devices)


def test_pages_leave_an_accelerator_room_to_load_its_weights() -> None:
    """Filled to the last byte, v6e:4x4 had no room for what is on its way to 128 slots' weights."""
    hardware = tpu_slice("v6e:4x4")
    layout = layout_of(GROK_1, 2, 8, "batch")
    pages, needed = pages_that_fit(
        GROK_1, layout, Precision(), hardware, slots=128, context=8192, page_size=64, chunk=512
    )
    assert 0 < pages < 64 * 128
    free = hardware.device.memory - needed.total
    assert free >= 0.3e9 - needed.programs
    assert free >= 0.01 * hardware.device.memory


@settings(max_examples=50, deadline=None)
@given(
    st.sampled_from([tpu_slice("v5e:8x8"), tpu_slice("v6e:4x4"), gpu_hosts("8xH100", 1), gpu_hosts("8xH200", 2)]),
    st.sampled_from(["int8", "bfloat16"]),
    st.sampled_from(["bfloat16", "int8"]),
    st.integers(1, 256),
    st.integers(512, 8192),
)
def test_what_is_recommended_is_legal_and_fits(
    hardware: object, weights: str, kv_cache: str, concurrency: int, context: int
) -> None:
    try:
        found = plan(GROK_1, hardware, Precision(weights, kv_cache=kv_cache), Workload(context, concurrency))  # type: ignore[arg-type]
    except DoesNotFitError:
        assume(False)
    best = found.best
    assert best.data * best.model == found.hardware.devices
    assert GROK_1.num_kv_heads % best.model == 0
    assert best.memory.total <= found.hardware.device.memory
    assert best.slots >= concurrency
    assert best.slots % found.layout.batch_groups == 0
    assert all(step.best <= step.worst for step in [*found.decode.values(), *found.prefill.values()])
    steps = [found.decode[batch].best for batch in sorted(found.decode)]
    assert steps == sorted(steps)
    configured = configuration(found)
    assert configured["engine"]["kv_pages"] == best.pages * found.layout.batch_groups


def test_more_devices_of_a_kind_are_never_slower_at_best() -> None:
    def step(topology: str) -> float:
        return plan(GROK_1, tpu_slice(topology), Precision(), Workload(8192, 8)).decode[8].best

    assert step("v6e:8x8") < step("v6e:4x8") < step("v6e:4x4")


def test_sums_over_hosts_cost_more_than_within_one() -> None:
    one, two = gpu_hosts("8xH100", 1), gpu_hosts("8xH100", 2)
    assert 0 == sum_seconds(one, 1, 1e6) < sum_seconds(one, 8, 1e6) < sum_seconds(two, 16, 1e6)


def test_the_page_answers_the_questions() -> None:
    text = describe(plan(GROK_1, gpu_hosts("8xH100", 1), Precision(), Workload(8192, 8, 0.03)))
    for question in ("Does a model of 315.68 billion", "Which mesh?", "How fast?", "How long until it serves?"):
        assert question in text
    assert "FP32 1,256 GB, FP16 628 GB, 8-bit 314 GB, 4-bit 157 GB" in text
    assert "30 ms a step for 8 sequences: met" in text
    assert "rules: tensor" in text
    assert "How much" not in text


def test_tokens_cost_what_the_devices_do_while_they_compute_them() -> None:
    found = plan(GROK_1, gpu_hosts("8xH100", 1), Precision(), Workload(8192, 8))
    prices = as_json(found, price=3.6)["price_of_a_million_tokens"]
    assert prices["completion"]["8"] == pytest.approx(8 * 3.6 / 3600 * found.decode[8].middle / 8 * 1e6)
    assert prices["completion"]["128"] < prices["completion"]["1"]
    assert prices["prompt"]["8192"] == pytest.approx(8 * 3.6 / 3600 * found.prefill[8192].middle / 8192 * 1e6)
    assert "completions, batch 8: " in describe(found, price=3.6)


def test_a_cache_shortens_the_next_start_and_not_that_of_a_new_host() -> None:
    two = plan(GROK_1, cpu_hosts(768e9, 400e9, 6e12, 2), Precision(activations="float32"), Workload(4096, 8))
    four = plan(GROK_1, cpu_hosts(768e9, 400e9, 6e12, 4), Precision(activations="float32"), Workload(4096, 8))
    found, fewer = as_json(four), as_json(two)
    assert found["load_seconds"]["weights_cache"] < found["load_seconds"]["disk"] / 2
    assert found["load_seconds"]["disk"] < found["recovery_seconds"]["best"] < fewer["recovery_seconds"]["best"]


@pytest.mark.parametrize(
    ("platform", "weights", "activations"),
    [
        ("gpu", "int8", "bfloat16"),
        ("gpu", "int4", "bfloat16"),
        ("gpu", "bfloat16", "bfloat16"),
        ("cpu", "int8", "float32"),
        ("cpu", "int4", "float32"),
    ],
)
def test_parameters_and_pages_take_what_was_planned(platform: str, weights: str, activations: str) -> None:
    """As accelerators keep them, and packed for native kernels; here XLA keeps int4 in bytes."""
    checkpoint = open_checkpoint(GOLDEN / "text-s1")
    config = checkpoint.config
    mesh = Mesh(np.array(jax.devices()[:4]).reshape(2, 2), AXES)
    partition = Partition.create(config, mesh, "batch", native_kernels() if platform == "cpu" else ACCELERATOR)
    dtype = jnp.dtype(activations)
    params, _ = load_parameters(checkpoint, partition, weights=weights, dtype=dtype)
    shape = EngineShape(8, partition.batch_groups, 40, 8, 16, 96)
    program_set = ProgramSet(config, shape, partition, params, dtype, jnp.bfloat16)
    runtime = Runtime(program_set, partition)
    runtime.set_parameters(params)
    planned = memory(
        config, layout_of(config, 2, 2, "batch"), Precision(weights, activations), platform,
        slots=8, pages=40, page_size=8, chunk=16,
    )  # fmt: skip
    held = runtime.device_bytes
    int4 = sum(leaf.addressable_shards[0].data.size // 2 for leaf in jax.tree.leaves(params) if leaf.dtype == jnp.int4)
    assert held["parameters"] / 4 - int4 == planned.weights
    assert held["kv_pages"] / 4 == planned.kv_pages
    assert held["sampling"] / 4 == pytest.approx(planned.sampling, rel=0.01)


HLO = """
HloModule jit_f
%fused_computation.1 (p: f32[8,8]) -> f32[1024,1024] {
  ROOT %b = f32[1024,1024]{1,0} broadcast(%p), dimensions={}
}
%body (arg: (s32[], f32[8])) -> (s32[], f32[8]) {
  %ar = f32[8,6144]{1,0:T(8,128)} all-reduce(%x), channel_id=1
  %ag = (f32[8]{0}, f32[64]{0}) all-gather-start(%y), channel_id=2
}
ENTRY %main (a: s8[1024,1024]) -> f32[1024,1024] {
  %a = s8[1024,1024]{1,0} parameter(0)
  %c = bf16[1024,1024]{1,0} convert(%a)
  %v = bf16[1024,1024]{1,0:T(8,128)(2,1)S(1)} copy(%c)
  %k = bf16[64,1,128,128]{3,2,1,0} fusion(%c), kind=kLoop
  ROOT %f = f32[1024,1024]{1,0} fusion(%c), kind=kLoop, calls=%fused_computation.1
}
"""


def test_a_programs_text_tells_its_collectives_and_its_large_buffers() -> None:
    traffic = hlo.collectives(HLO)
    assert traffic == {
        "all-gather": hlo.Traffic(1, 256, 256),
        "all-reduce": hlo.Traffic(1, 8 * 6144 * 4, 8 * 6144 * 4),
    }
    large = hlo.large_buffers(HLO, 1_000_000, {(64, 128, 128)})
    assert large == {"convert bf16[1024,1024]": 1, "fusion f32[1024,1024]": 1}


def test_the_committed_support_matrix_keeps_its_promises() -> None:
    """What `make aot` wrote: every topology, temporaries and collectives of decoding within their limits, the planner right."""
    rows = [
        [cell.strip() for cell in line.strip().strip("|").split("|")]
        for line in (DEMO.parent.parent / "docs" / "support-matrix.md").read_text().splitlines()
        if re.match(r"\| *(v\d|\d x)", line)
    ]
    assert {row[0] for row in rows} == {
        "v5e:4x8", "v5e:8x8", "v5p:2x2x2", "v6e:4x4", "v4:2x2x4", "1 x 8xH100", "2 x 8xH100",
    }  # fmt: skip
    for hardware, _, precision, program, sequences, fits, peak, temporaries, planned, error, largest, copies, _ in rows:
        if fits == "no":
            device = DEVICES[hardware.split(":")[0].split("x")[-1]]
            assert float(planned) * 2**30 > 0.95 * device.memory
            continue
        assert abs(float(planned) / float(peak) - 1) < 0.03, error
        if program == "decode" and ":" in hardware and precision == "int8, bfloat16":
            assert float(temporaries) <= (64 if int(sequences) < 128 else 80)  # on v5e the table of counts is copied
            assert not re.search(r"\b(bf16|f32|s8)\[", copies), copies
            if int(sequences) == 8:
                assert float(largest) <= 8


def test_meshes_are_those_on_which_heads_divide() -> None:
    assert meshes(GROK_1, 8)[0] == (1, 8, "tensor")
    assert (2, 8, "batch") in meshes(GROK_1, 16)
    assert meshes(GROK_1, 6) == []
    few = dataclasses.replace(GROK_1, num_kv_heads=2)
    assert {model for _, model, _ in meshes(few, 8)} == {1, 2}
