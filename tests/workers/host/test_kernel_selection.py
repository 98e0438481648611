"""Which kernels a mesh computes with."""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import pytest

from tests.conftest import GOLDEN
from workers.checkpoint.checkpoint import open_checkpoint
from workers.checkpoint.loader import parameter_shapes
from workers.host import kernel_selection
from workers.host.kernel_selection import hold_to_promise, negotiate, select_kernels
from workers.kernels.cpu.kernels import INSTRUCTION_SETS, native_kernels, use_instruction_set
from workers.kernels.gpu.kernels import GPU
from workers.kernels.interface import ACCELERATOR, PORTABLE
from workers.kernels.tpu.kernels import TPU
from workers.messages.plan import EngineShape
from workers.messages.specs import MeshSpec, ModelSpec
from workers.model.partition import Partition
from workers.runtime.mesh import abstract_mesh

CHECKPOINT = open_checkpoint(GOLDEN / "nano-s1")
MODEL = ModelSpec("m", "", "int8", "float32")
MESH = MeshSpec("cpu", 1, 1, 1, 1, "tensor")


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    best = native_kernels().name
    yield
    use_instruction_set(best)


def test_cpu_hosts_compute_natively_what_fits() -> None:
    assert select_kernels(MODEL, MESH, CHECKPOINT).name in INSTRUCTION_SETS
    for model in (dataclasses.replace(MODEL, weights="float32"), dataclasses.replace(MODEL, activations="bfloat16")):
        assert select_kernels(model, MESH, CHECKPOINT) is PORTABLE
    assert select_kernels(dataclasses.replace(MODEL, kv_cache="int8"), MESH, CHECKPOINT) is PORTABLE
    assert select_kernels(MODEL, dataclasses.replace(MESH, rules="xai"), CHECKPOINT) is PORTABLE


def test_accelerators_have_kernels_of_their_own() -> None:
    model = dataclasses.replace(MODEL, activations="bfloat16")
    for platform, kernels in (("gpu", GPU), ("tpu", TPU)):
        assert select_kernels(model, dataclasses.replace(MESH, platform=platform), CHECKPOINT) is kernels
        assert kernels.accelerator
    gpu = dataclasses.replace(MESH, platform="gpu")
    assert select_kernels(MODEL, gpu, CHECKPOINT) is ACCELERATOR
    assert select_kernels(model, dataclasses.replace(gpu, rules="xai"), CHECKPOINT) is ACCELERATOR


@pytest.mark.parametrize(("kind", "name"), [("TPU v4", "tpu-v4"), ("TPU v5p", "tpu"), ("TPU v6 lite", "tpu")])
def test_the_kind_of_tpu_is_known_when_the_mesh_is_joined(
    monkeypatch: pytest.MonkeyPatch, kind: str, name: str
) -> None:
    monkeypatch.setattr(jax, "devices", lambda: [types.SimpleNamespace(device_kind=kind)])
    assert negotiate(TPU, 1.0).name == name


@pytest.mark.parametrize(("golden", "kept"), [("head128-s5", True), ("nano-s1", False)])
def test_kernels_for_gpus_promise_batch_invariance_only_where_they_compute_everything(golden: str, kept: bool) -> None:
    checkpoint = open_checkpoint(GOLDEN / golden)
    partition = Partition.create(checkpoint.config, abstract_mesh(1, 1), "batch", GPU)
    shape = EngineShape(2, 1, 9, 16, 32, 64, GPU.batch_invariant)
    params = parameter_shapes(checkpoint, partition, dtype=jnp.bfloat16)
    held_shape, held = hold_to_promise(checkpoint.config, shape, partition, params, jnp.bfloat16)
    assert held.kernels.batch_invariant == held_shape.batch_invariant == kept
    assert held.kernels.name == GPU.name


def test_weights_are_refused_where_nothing_computes_them() -> None:
    unrounded, in_4_bits = (dataclasses.replace(MODEL, weights=weights) for weights in ("int8-unrounded", "int4"))
    for model in (unrounded, in_4_bits):
        assert select_kernels(model, MESH, CHECKPOINT) is not PORTABLE
    with pytest.raises(ValueError, match="int8-unrounded needs the native kernels: they take CPU hosts"):
        select_kernels(unrounded, dataclasses.replace(MESH, platform="tpu"), CHECKPOINT)
    with pytest.raises(ValueError, match="int4 needs the native kernels: they take CPU hosts"):
        select_kernels(dataclasses.replace(in_4_bits, activations="bfloat16"), MESH, CHECKPOINT)


@pytest.mark.parametrize("least", ["xla", "portable"])
def test_a_mesh_computes_as_the_least_of_its_hosts_can(monkeypatch: pytest.MonkeyPatch, least: str) -> None:
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(kernel_selection, "tell", lambda topic, name, seconds: [name, least])
    kernels = negotiate(native_kernels(), 1.0)
    assert kernels.name == least
    assert kernels.batch_invariant == (least != "xla")
