"""The model against xAI's numbers, and its layout on meshes."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from typing import Any

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

from tests.conftest import GOLDEN
from tools.verify.verify import score
from workers.checkpoint.checkpoint import open_checkpoint
from workers.checkpoint.loader import Params, load_parameters, parameter_shapes
from workers.kernels.cpu.kernels import native_kernels
from workers.kernels.interface import ACCELERATOR, PORTABLE
from workers.kernels.weights import QuantizedWeight, dequantize
from workers.messages.plan import EngineShape
from workers.model.config import GrokConfig
from workers.model.grok import Output, causal_forward
from workers.model.parameters import parameter_table
from workers.model.partition import Partition
from workers.runtime.program_set import ProgramSet
from workers.runtime.runtime import Runtime

pytestmark = pytest.mark.slow


def _mesh(data: int, model: int) -> Mesh:
    return Mesh(np.array(jax.devices()[: data * model]).reshape(data, model), ("data", "model"))


def _load(directory: pathlib.Path, mesh: Mesh, rules: str = "tensor", weights: str = "int8") -> Params:
    checkpoint = open_checkpoint(directory)
    params, progress = load_parameters(checkpoint, Partition.create(checkpoint.config, mesh, rules), weights=weights)
    # Parts that share a group of scales read it both.
    assert checkpoint.nbytes <= progress.read <= checkpoint.nbytes * 1.01
    return params


def test_the_model_takes_each_parameter_of_the_table() -> None:
    checkpoint = open_checkpoint(GOLDEN / "nano-s1")
    params = parameter_shapes(checkpoint, Partition.create(checkpoint.config, _mesh(1, 1)))
    model: Any = hk.without_apply_rng(hk.transform(lambda tokens: causal_forward(checkpoint.config, tokens)))
    tokens = jnp.zeros((1, 2), jnp.int32)
    jax.eval_shape(model.apply, params, tokens)
    places = {info.place for info in parameter_table(checkpoint.config)}
    assert places == {(module, name) for module, values in params.items() for name in values}
    for module, name in places:
        without = params | {module: {key: value for key, value in params[module].items() if key != name}}
        with pytest.raises(ValueError, match="Initializer must be specified"):
            jax.eval_shape(model.apply, without, tokens)


@pytest.mark.parametrize("weights", ["int8", "float32"])
def test_logits_are_those_of_float32_arithmetic(golden: pathlib.Path, weights: str) -> None:
    config = GrokConfig.load(golden / "config.json")
    params = _load(golden, _mesh(1, 1), weights=weights)
    model: Any = hk.without_apply_rng(hk.transform(lambda tokens: causal_forward(config, tokens)))
    apply = jax.jit(model.apply)
    with np.load(golden / "exact.npz") as exact, np.load(golden / "ref-1x1.npz") as reference:
        for case in json.loads((golden / "cases.json").read_text())["forward"]:
            output: Output = apply(params, jnp.array([case["prompt"]]))
            expected = exact[f"forward/{case['name']}/logits"]
            clear = exact[f"forward/{case['name']}/router_gap"] > 1e-3
            error = np.abs(np.asarray(output.read[0]) - expected)[clear]
            assert error.max(initial=0.0) < 1e-5 * max(10, expected.std() * 5)
            if case["name"] == "logits-len32":
                # The router's probabilities after each layer, as the original computed them in bfloat16.
                traced = reference["trace/router_probs"]
                assert np.median(np.abs(np.asarray(output.routed.probabilities[:, 0]) - traced)) < 0.01


def test_rows_of_a_weight_are_scaled_by_their_group_and_rounded_to_bfloat16() -> None:
    weight = jnp.array([[100], [3], [-7], [127]], jnp.int8)
    scales = jnp.array([[0.5], [0.0231]], jnp.bfloat16)
    scale = float(scales[1, 0])
    got = np.asarray(dequantize(QuantizedWeight(weight, scales)))[:, 0]
    rounded = [float(jnp.bfloat16(value * scale)) for value in (-7, 127)]
    np.testing.assert_array_equal(got, [50.0, 1.5, *rounded])
    assert rounded[1] != 127 * scale


def test_the_rules_of_xai_are_reproduced() -> None:
    partition = Partition.create(GrokConfig(), _mesh(2, 4), "xai")
    specs = {info.path: partition.spec(info.axes) for info in parameter_table(GrokConfig(num_layers=1))}
    layer = "transformer/decoder_layer_0"
    assert specs["language_model/in_out_embed/embeddings"] == PartitionSpec(None, ("data", "model"))
    assert specs[f"{layer}/moe/linear/w"] == PartitionSpec(None, "data", "model")
    assert specs[f"{layer}/moe/linear_v/w"] == PartitionSpec(None, "data", "model")
    assert specs[f"{layer}/moe/linear_1/w"] == PartitionSpec(None, "model", "data")
    for name in ("query", "key", "value"):
        assert specs[f"{layer}/multi_head_attention/{name}/w"] == PartitionSpec("data", "model")
    assert specs[f"{layer}/multi_head_attention/linear/w"] == PartitionSpec("model", "data")
    assert specs[f"{layer}/router/w"] == PartitionSpec("data", None)
    assert specs[f"{layer}/rms_norm/scale"] == PartitionSpec(None)


def test_what_does_not_divide_is_not_split() -> None:
    config = GrokConfig.load(GOLDEN / "nano-s1" / "config.json")  # 8 KV heads, experts 192 wide
    partition = Partition.create(config, _mesh(1, 3))
    assert partition.spec(("embed", "kv_heads")) == PartitionSpec(None, None)
    assert partition.spec((None, "embed", "ffn")) == PartitionSpec(None, None, ("data", "model"))
    assert partition.scale_groups(8, "ffn") == 24


@pytest.mark.parametrize(
    ("data", "model", "rules"), [(1, 3, "tensor"), (2, 2, "tensor"), (2, 4, "xai"), (4, 2, "batch")]
)
def test_a_loaded_weight_has_the_files_values_on_any_mesh(data: int, model: int, rules: str) -> None:
    checkpoint = open_checkpoint(GOLDEN / "nano-s1")
    params = _load(GOLDEN / "nano-s1", _mesh(data, model), rules)
    for info, file in checkpoint.tensors:
        module, name = info.place
        kept = params[module][name]
        loaded = jax.tree.map(lambda leaf, layer=info.layer: leaf if layer is None else leaf[layer], kept)
        if file.scales is None:
            np.testing.assert_array_equal(np.asarray(loaded), file.map(file.values))
            continue
        raw = QuantizedWeight(jnp.asarray(file.map(file.values)), jnp.asarray(file.map(file.scales)))
        assert isinstance(loaded, QuantizedWeight)
        np.testing.assert_array_equal(np.asarray(dequantize(loaded)), np.asarray(dequantize(raw)))


@pytest.mark.parametrize("model", [1, 2])
def test_4_bit_weights_of_native_kernels_compute_what_plain_jax_does(model: int) -> None:
    checkpoint = open_checkpoint(GOLDEN / "head128-s5")
    computed = []
    for kernels in (native_kernels(), PORTABLE):
        partition = Partition.create(checkpoint.config, _mesh(1, model), "batch", kernels)
        params, _ = load_parameters(checkpoint, partition, weights="int4")
        shape = EngineShape(2, 1, 9, 16, 32, 128)
        runtime = Runtime(ProgramSet(checkpoint.config, shape, partition, params, jnp.float32), partition)
        runtime.set_parameters(params)
        computed.append(score(runtime, list(range(5, 37)))[0])
    # Plain JAX rounds a weight to bfloat16 once it is multiplied by its scale.
    np.testing.assert_allclose(computed[0], computed[1], atol=0.05 * computed[1].std())


def test_4_bit_weights_have_the_same_values_two_a_byte() -> None:
    checkpoint = open_checkpoint(GOLDEN / "head128-s5")
    kept: list[Any] = []
    for paired in (False, True):
        kernels = dataclasses.replace(ACCELERATOR, paired=paired)
        partition = Partition.create(checkpoint.config, _mesh(2, 2), "batch", kernels)
        kept.append(load_parameters(checkpoint, partition, weights="int4", dtype=jnp.bfloat16)[0])
    sizes = [sum(leaf.nbytes for leaf in jax.tree.leaves(params)) for params in kept]
    assert sizes[1] < 0.7 * sizes[0]
    for module, own in kept[0].items():
        for name, weight in own.items():
            if name == "w":
                np.testing.assert_array_equal(dequantize(kept[1][module][name]), dequantize(weight))


def test_each_device_holds_only_its_part() -> None:
    params = _load(GOLDEN / "nano-s1", _mesh(2, 2))
    weight = params["transformer/decoder_layers/moe/linear_1"]["w"]
    assert isinstance(weight, QuantizedWeight)
    assert {shard.data.shape for shard in weight.weight.addressable_shards} == {(2, 8, 48, 128)}
    assert {shard.data.shape for shard in weight.scales.addressable_shards} == {(2, 8, 2, 128)}


@pytest.mark.parametrize("weights", ["int8", "float32"])
@pytest.mark.parametrize("native", [False, True])
@pytest.mark.parametrize(
    ("data", "model", "rules"), [(1, 3, "tensor"), (2, 4, "tensor"), (4, 2, "batch"), (2, 2, "xai")]
)
def test_shapes_are_known_before_anything_is_loaded(
    data: int, model: int, rules: str, native: bool, weights: str
) -> None:
    if native and (rules == "xai" or weights != "int8"):
        pytest.skip("native kernels take neither")
    checkpoint = open_checkpoint(GOLDEN / "nano-s1")
    kernels = native_kernels() if native else PORTABLE
    partition = Partition.create(checkpoint.config, _mesh(data, model), rules, kernels)
    params, _ = load_parameters(checkpoint, partition, weights=weights)
    shapes = parameter_shapes(checkpoint, partition, weights=weights)
    assert str(jax.tree.structure(params)) == str(jax.tree.structure(shapes))
    for loaded, told in zip(jax.tree.leaves(params), jax.tree.leaves(shapes), strict=True):
        assert (loaded.shape, loaded.dtype) == (told.shape, told.dtype)
        assert loaded.sharding.is_equivalent_to(told.sharding, loaded.ndim)
