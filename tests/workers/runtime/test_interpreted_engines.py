"""The whole engine with the kernels for GPUs and for TPUs, interpreted, against plain JAX."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from tests.conftest import GOLDEN
from tools.aot.release import release_headers
from tools.bench.slice import random_parameters
from tools.verify.golden import BFLOAT16, GoldenSet, judge_forward
from tools.verify.verify import score
from workers.checkpoint.checkpoint import open_checkpoint
from workers.checkpoint.loader import load_parameters, parameter_shapes
from workers.host.kernel_selection import hold_to_promise
from workers.kernels.gpu.kernels import gpu_kernels
from workers.kernels.interface import ACCELERATOR, Kernels
from workers.kernels.tpu.kernels import tpu_kernels
from workers.kernels.tpu.matmul import Target
from workers.messages.plan import Chunk, DecodeRow, EngineShape, Plan, Sampling, SlotStart, Token
from workers.model import partition as partitions
from workers.model.config import GrokConfig
from workers.model.partition import Partition
from workers.runtime.program_set import ProgramSet
from workers.runtime.runtime import Runtime

pytestmark = pytest.mark.slow

#: Heads as wide as Grok-1's; everything fits the kernels' tiles also where it is split in four.
CONFIG = GrokConfig(
    emb_size=256,
    num_layers=2,
    num_q_heads=4,
    num_kv_heads=2,
    key_size=128,
    ffn_size=512,
    vocab_size=512,
    num_experts=4,
    sequence_len=128,
)
KERNELS = {"gpu": gpu_kernels(interpret=True), "tpu": tpu_kernels(Target(interpret=True))}
PROMPTS = (tuple(range(10, 50)), tuple(range(100, 107)), tuple(range(200, 260)))
STEPS = 5


def make_runtime(kernels: Kernels, data: int, model: int, kv_dtype: Any, weights: str = "int8") -> Runtime:
    mesh = Mesh(np.array(jax.devices()[: data * model]).reshape(data, model), ("data", "model"))
    partition = Partition.create(CONFIG, mesh, "batch", kernels)
    shapes = parameter_shapes(release_headers(CONFIG), partition, weights=weights, dtype=jnp.bfloat16)
    params = jax.tree.map(lambda value, shape: jax.device_put(value, shape.sharding), random_parameters(shapes), shapes)
    shape = EngineShape(4, partition.batch_groups, 17, 16, 64, 128, kernels.batch_invariant)
    assert hold_to_promise(CONFIG, shape, partition, shapes, kv_dtype) == (shape, partition)
    runtime = Runtime(ProgramSet(CONFIG, shape, partition, params, jnp.bfloat16, kv_dtype), partition)
    runtime.set_parameters(params)
    return runtime


def compute(kernels: Kernels, data: int, model: int, kv_dtype: Any, weights: str) -> list[list[Token]]:
    """What is drawn greedily after each of three prompts that are decoded together."""
    runtime = make_runtime(kernels, data, model, kv_dtype, weights)
    plans = iter(range(1, 100))
    drawn: list[list[Token]] = []
    for slot, prompt in enumerate(PROMPTS):
        first = 1 + 5 * (slot % 2 if runtime.shape.groups == 2 else slot)
        start = SlotStart(slot, tuple(range(first, first + 5)), Sampling())
        chunk = Chunk(slot, 0, prompt, last=True)
        plan = Plan(next(plans), (start,), ((chunk,),), ())
        drawn.append(list(runtime.read(runtime.execute(plan)).prefilled))
    for step in range(STEPS):
        rows = tuple(DecodeRow(slot, len(prompt) + step) for slot, prompt in enumerate(PROMPTS))
        tokens = runtime.read(runtime.execute(Plan(next(plans), (), (), rows)))
        for kept, (token,) in zip(drawn, tokens.decoded, strict=True):
            kept.append(token)
    return drawn


@pytest.mark.parametrize(
    ("platform", "data", "model", "kv_dtype", "weights"),
    [
        ("gpu", 1, 1, jnp.int8, "int8"),
        ("gpu", 2, 2, jnp.bfloat16, "int8"),
        ("gpu", 2, 2, jnp.bfloat16, "int4"),
        ("tpu", 1, 1, jnp.int8, "int8"),
        ("tpu", 2, 2, jnp.bfloat16, "int8"),  # JAX compiles no arguments of 4 bits for CPUs
    ],
)
def test_tokens_are_those_of_plain_jax(
    platform: str, data: int, model: int, kv_dtype: Any, weights: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernels = KERNELS[platform]
    plain = dataclasses.replace(ACCELERATOR, paired=kernels.paired)  # the same parameters
    wanted = compute(plain, data, model, kv_dtype, weights)
    monkeypatch.setattr(partitions, "_GATHERED", 1 << 14)  # so that sums of a chunk are those of many rows
    drawn = compute(kernels, data, model, kv_dtype, weights)
    for tokens, expected in zip(drawn, wanted, strict=True):
        assert [token.id for token in tokens] == [token.id for token in expected]
        np.testing.assert_allclose(
            [token.logprob for token in tokens], [token.logprob for token in expected], atol=0.05
        )


#: For a process whose processors do not multiply and add at once: in which loops they would is up to the compiler for CPUs, and
#: kernels that are interpreted are many loops, where a GPU has one.
COMPARE = """
import sys
import jax
jax.config.update("jax_num_cpu_devices", 4)
import jax.numpy as jnp
from tests.workers.runtime.test_interpreted_engines import gpu_kernels, make_runtime
from tools.selftest import invariance
invariance._REQUESTS = 4
found = invariance.compare(make_runtime(gpu_kernels(interpret=True), *map(int, sys.argv[1:]), jnp.bfloat16))
assert found.outcome == "ok", found.text
assert found.figures["guesses"] > 0
"""


@pytest.mark.parametrize(("data", "model"), [(1, 1), (2, 2)])
def test_a_request_has_the_same_bits_alone_in_company_and_taken_up_again(data: int, model: int) -> None:
    environment = {**os.environ, "XLA_FLAGS": "--xla_cpu_max_isa=AVX"}
    command = [sys.executable, "-c", COMPARE, str(data), str(model)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("platform", KERNELS)
def test_what_xais_code_has_computed_comes_out(platform: str) -> None:
    """A prompt of the golden set whose heads are as wide as Grok-1's, which the kernels compute."""
    directory = GOLDEN / "head128-s5"
    golden, checkpoint = GoldenSet.load(directory), open_checkpoint(directory)
    mesh = Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("data", "model"))
    partition = Partition.create(checkpoint.config, mesh, "batch", KERNELS[platform])
    params, _ = load_parameters(checkpoint, partition, dtype=jnp.bfloat16)
    shape = EngineShape(2, 1, 9, 16, 32, 128)
    runtime = Runtime(ProgramSet(checkpoint.config, shape, partition, params, jnp.bfloat16), partition)
    runtime.set_parameters(params)
    (case,) = (case for case in golden.forward if len(case["prompt"]) == 32)
    logits, probabilities = score(runtime, case["prompt"])
    verdict = judge_forward(golden, case, logits, probabilities, checkpoint.config.num_selected_experts, BFLOAT16)
    assert verdict.problems == ()
    assert verdict.judged > 16
