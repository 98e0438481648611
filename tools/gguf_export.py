"""Writes a checkpoint as a GGUF file for llama.cpp.

llama.cpp computes Grok-1 nearly as xAI's code does: it scales the two gates to a sum of one, which the norm after the
experts takes back but for its epsilon. Every multiplier is written out, as it would silently assume the release's.
"""

from __future__ import annotations

import pathlib
from typing import Any

import ml_dtypes
import numpy as np

from workers.checkpoint.checkpoint import Checkpoint
from workers.checkpoint.errors import CheckpointError
from workers.checkpoint.tensor_file import TensorFile
from workers.model.parameters import ParameterInfo

Array = np.ndarray[Any, np.dtype[Any]]

#: Values of a tensor's last dimension that share a scale in llama.cpp's Q8_0 and Q4_0.
BLOCK = 32

_NAMES = {
    "language_model/in_out_embed/embeddings": "token_embd",
    "language_model/rms_norm/scale": "output_norm",
}
_LAYER_NAMES = {
    "multi_head_attention/query/w": "attn_q",
    "multi_head_attention/key/w": "attn_k",
    "multi_head_attention/value/w": "attn_v",
    "multi_head_attention/linear/w": "attn_output",
    "rms_norm/scale": "attn_norm",
    "rms_norm_1/scale": "attn_output_norm",
    "rms_norm_2/scale": "ffn_norm",
    "rms_norm_3/scale": "layer_output_norm",
    "router/w": "ffn_gate_inp",
    "moe/linear/w": "ffn_gate_exps",
    "moe/linear_v/w": "ffn_up_exps",
    "moe/linear_1/w": "ffn_down_exps",
}


def export_gguf(checkpoint: Checkpoint, target: pathlib.Path, kind: str = "q8_0") -> None:
    """Writes `target`.

    Args:
      checkpoint: of which a tokenizer.model, if there is one, is exported too; without one tokens get made-up names.
      target: file to write.
      kind: `q8_0`, `q4_0` (with the embedding in q8_0) or `f32`: of matrices. Norms and routers are always float32.

    Raises:
      CheckpointError: llama.cpp can't hold this model.
    """
    import gguf

    c = checkpoint.config
    if c.num_q_heads * c.key_size != c.emb_size:
        problem = f"{c.num_q_heads} heads of {c.key_size} are not its width of {c.emb_size}, as llama.cpp needs"
        raise CheckpointError(checkpoint.directory, problem)
    if kind != "f32" and (c.emb_size % BLOCK or c.ffn_size % BLOCK):
        problem = f"rows of {c.emb_size} and {c.ffn_size} are no multiples of {BLOCK}; export it as f32"
        raise CheckpointError(checkpoint.directory, problem)
    writer = gguf.GGUFWriter(target, "grok")
    writer.add_name(checkpoint.directory.name)
    writer.add_context_length(c.sequence_len)
    writer.add_embedding_length(c.emb_size)
    writer.add_block_count(c.num_layers)
    writer.add_feed_forward_length(c.ffn_size)
    writer.add_expert_feed_forward_length(c.ffn_size)
    writer.add_head_count(c.num_q_heads)
    writer.add_head_count_kv(c.num_kv_heads)
    writer.add_key_length(c.key_size)
    writer.add_value_length(c.key_size)
    writer.add_rope_dimension_count(c.key_size)
    writer.add_rope_freq_base(c.rope_base)
    writer.add_layer_norm_rms_eps(c.norm_epsilon)
    writer.add_expert_count(c.num_experts)
    writer.add_expert_used_count(c.num_selected_experts)
    writer.add_vocab_size(c.vocab_size)
    writer.add_embedding_scale(c.embedding_multiplier_scale)
    writer.add_logit_scale(c.output_multiplier_scale)
    writer.add_attn_output_scale(c.attn_output_multiplier)
    writer.add_attn_logit_softcapping(c.attn_logit_cap)
    _add_tokenizer(writer, checkpoint)
    file_types = gguf.LlamaFileType
    writer.add_file_type(
        {"q8_0": file_types.MOSTLY_Q8_0, "q4_0": file_types.MOSTLY_Q4_0, "f32": file_types.ALL_F32}[kind]
    )
    types = gguf.GGMLQuantizationType

    def type_of(info: ParameterInfo) -> gguf.GGMLQuantizationType:
        if kind == "f32" or not _is_matrix(info):
            return types.F32
        return types.Q4_0 if kind == "q4_0" and _is_product(info) else types.Q8_0

    # The header holds all shapes, so it comes first; then one tensor at a time is in memory.
    for info, _ in checkpoint.tensors:
        dtype = type_of(info)
        values_of_block, bytes_of_block = gguf.GGML_QUANT_SIZES[dtype]
        size = info.size // values_of_block * bytes_of_block
        shape = (*info.shape[:-2], info.shape[-1], info.shape[-2]) if _is_product(info) else info.shape
        writer.add_tensor_info(f"{_name(info)}.weight", shape, np.dtype(np.float32), size, raw_dtype=dtype)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for info, file in checkpoint.tensors:
        writer.write_tensor_data(gguf.quants.quantize(_values(file, _is_product(info)), type_of(info)))
    writer.close()


def _name(info: ParameterInfo) -> str:
    layer = info.path.removeprefix("transformer/decoder_layer_")
    if layer == info.path:
        return _NAMES[info.path]
    number, rest = layer.split("/", 1)
    return f"blk.{number}.{_LAYER_NAMES[rest]}"


def _is_product(info: ParameterInfo) -> bool:
    """Whether it is multiplied with, columns first in llama.cpp; the embedding has its rows first already."""
    return len(info.shape) > 1 and not info.path.endswith("embeddings")


def _is_matrix(info: ParameterInfo) -> bool:
    """Whether it is large, and `kind` says how it is stored."""
    return info.quantized or info.path.endswith("embeddings")


def _values(file: TensorFile, product: bool) -> Array:
    """float32 values, products transposed: [..., N, K]."""
    values: Array = np.asarray(file.map(file.values))
    if file.scales is not None:
        scales = np.asarray(file.map(file.scales)).astype(np.float32)
        *lead, rows, columns = values.shape
        groups = scales.shape[-2]
        grouped = values.reshape(*lead, groups, rows // groups, columns).astype(np.float32) * scales[..., :, None, :]
        values = grouped.astype(ml_dtypes.bfloat16).reshape(values.shape)  # as the model rounds them
    values = values.astype(np.float32)
    return np.ascontiguousarray(values.swapaxes(-1, -2)) if product else values


def _add_tokenizer(writer: Any, checkpoint: Checkpoint) -> None:
    import gguf
    import sentencepiece

    c, path = checkpoint.config, checkpoint.directory / "tokenizer.model"
    if not path.exists():
        names = [f"<{id}>" for id in range(c.vocab_size)]
        writer.add_tokenizer_model("llama")
        writer.add_token_list(names)
        writer.add_token_scores([0.0] * len(names))
        writer.add_token_types([gguf.TokenType.NORMAL] * len(names))
        return
    writer.add_tokenizer_model("llama")
    writer.add_eos_token_id(c.eos_token)
    writer.add_pad_token_id(c.pad_token)
    writer.add_add_bos_token(False)
    writer.add_add_space_prefix(True)
    normal, control, unknown, byte = (
        gguf.TokenType.NORMAL, gguf.TokenType.CONTROL, gguf.TokenType.UNKNOWN, gguf.TokenType.BYTE
    )  # fmt: skip
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(path))
    ids = range(pieces.get_piece_size())
    names = [pieces.id_to_piece(id) for id in ids]
    scores = [pieces.get_score(id) for id in ids]
    kinds = [
        unknown
        if pieces.is_unknown(id)
        else control
        if pieces.is_control(id)
        else byte
        if pieces.is_byte(id)
        else normal
        for id in ids
    ]
    writer.add_token_list(names)
    writer.add_token_scores(scores)
    writer.add_token_types(kinds)
