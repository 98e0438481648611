"""A GGUF file has the checkpoint's values where llama.cpp looks for them, and says every multiplier."""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Any

import numpy as np
import pytest
from gguf import GGUFReader, dequantize

from tests.conftest import DEMO, GOLDEN
from tools.gguf_export import export_gguf
from workers.checkpoint.checkpoint import open_checkpoint
from workers.checkpoint.errors import CheckpointError
from workers.kernels.weights import QuantizedWeight
from workers.kernels.weights import dequantize as values_of


@pytest.mark.parametrize(("kind", "tolerance"), [("f32", 0.0), ("q8_0", 0.006), ("q4_0", 0.15)])
def test_tensors_and_multipliers_are_the_checkpoints(tmp_path: pathlib.Path, kind: str, tolerance: float) -> None:
    checkpoint = open_checkpoint(GOLDEN / "nano-s1")
    config = checkpoint.config
    export_gguf(checkpoint, tmp_path / "model.gguf", kind)
    reader = GGUFReader(tmp_path / "model.gguf")
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    assert len(tensors) == len(checkpoint.tensors)
    for name, path in {
        "token_embd": "language_model/in_out_embed/embeddings",
        "blk.1.ffn_down_exps": "transformer/decoder_layer_1/moe/linear_1/w",
        "blk.0.attn_q": "transformer/decoder_layer_0/multi_head_attention/query/w",
        "blk.0.ffn_gate_inp": "transformer/decoder_layer_0/router/w",
    }.items():
        (file,) = (file for info, file in checkpoint.tensors if info.path == path)
        stored = np.asarray(file.map(file.values))
        want = stored
        if file.scales is not None:
            weight: Any = QuantizedWeight(stored, np.asarray(file.map(file.scales)))  # type: ignore[arg-type]
            want = np.asarray(values_of(weight))
        want = want if name == "token_embd" else want.swapaxes(-1, -2)
        tensor = tensors[f"{name}.weight"]
        got = dequantize(tensor.data, tensor.tensor_type).reshape(want.shape)
        np.testing.assert_allclose(got, want, atol=tolerance * np.abs(want).max())
    for key, value in {
        "grok.embedding_scale": config.embedding_multiplier_scale,
        "grok.logit_scale": config.output_multiplier_scale,
        "grok.attention.output_scale": config.attn_output_multiplier,
        "grok.attn_logit_softcapping": 30.0,
        "grok.expert_used_count": config.num_selected_experts,
        "grok.block_count": config.num_layers,
    }.items():
        field = reader.get_field(key)
        assert field is not None, key
        assert field.contents() == pytest.approx(value), key


def test_the_tokenizer_goes_along(tmp_path: pathlib.Path) -> None:
    export_gguf(open_checkpoint(GOLDEN / "text-s1"), tmp_path / "model.gguf", "f32")
    field = GGUFReader(tmp_path / "model.gguf").get_field("tokenizer.ggml.tokens")
    assert field is not None
    assert "\u2581the" in field.contents()


def test_a_model_that_llama_cpp_can_not_hold_is_refused(tmp_path: pathlib.Path) -> None:
    checkpoint = open_checkpoint(DEMO)
    odd = dataclasses.replace(checkpoint, config=dataclasses.replace(checkpoint.config, key_size=2))
    with pytest.raises(CheckpointError, match=r"as llama\.cpp needs"):
        export_gguf(odd, tmp_path / "model.gguf")
