"""A checkpoint of random weights in xAI's format, for measuring."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from typing import Any

import ml_dtypes
import numpy as np

from tools.checkpoint_writer import write_array, write_quantized
from workers.model.config import GrokConfig
from workers.model.parameters import parameter_table

#: 1.27 billion parameters, of which a token at batch 1 reads 0.37 billion.
MID_SIZE = GrokConfig(
    emb_size=1024,
    num_layers=12,
    num_q_heads=8,
    num_kv_heads=2,
    key_size=128,
    ffn_size=4096,
    vocab_size=32768,
    sequence_len=8192,
    embedding_multiplier_scale=1024**0.5,
)

#: Groups of rows with scales of their own where the release has them.
GROUPS = 8


def make_checkpoint(
    directory: pathlib.Path, config: GrokConfig = MID_SIZE, seed: int = 0, groups: int = GROUPS
) -> None:
    """Writes a model of `config` into `directory`, unless one of that configuration is there.

    Weights are drawn so that every layer keeps its input's size; the release's layout and types are kept, and where it has
    groups of rows with scales of their own, there are `groups`.
    """
    wanted = json.dumps(dataclasses.asdict(config), indent=1)
    done = directory / "config.json"
    if done.exists() and done.read_text() == wanted:
        return
    folder = directory / "ckpt-0"
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(seed)
    for i, info in enumerate(parameter_table(config)):
        path = folder / f"tensor{i:05d}_000"
        if info.path.endswith("scale"):
            write_array(path, np.ones(info.shape, np.float32))
        elif not info.quantized:
            depth = 1.0 if info.path.endswith("embeddings") else info.shape[0]
            deviation = depth**-0.5 if depth > 1 else 1.0 / config.embedding_multiplier_scale
            write_array(path, (random.standard_normal(info.shape, np.float32) * deviation).astype(np.float32))
        else:
            *lead, rows, columns = info.shape
            weight = random.integers(-127, 128, info.shape, np.int8)
            ways = groups if info.grouped else 1
            spread = 73.3  # of integers drawn evenly from -127 to 127
            scales: Any = random.uniform(0.8, 1.2, (*lead, ways, columns)) / (spread * rows**0.5)
            write_quantized(path, weight, scales.astype(ml_dtypes.bfloat16))
    _write_tokenizer(directory / "tokenizer.model", config)
    done.write_text(wanted)


def _write_tokenizer(path: pathlib.Path, config: GrokConfig) -> None:
    """A SentencePiece model of the right size: bytes, and made-up words that no text holds."""
    from sentencepiece import sentencepiece_model_pb2

    model: Any = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]
    kinds = model.SentencePiece
    pieces = [("<pad>", kinds.CONTROL), ("<unk>", kinds.UNKNOWN), ("<eos>", kinds.CONTROL)]
    pieces += [(f"<0x{byte:02X}>", kinds.BYTE) for byte in range(256)]
    pieces += [(f"\u2581w{id}", kinds.NORMAL) for id in range(len(pieces), config.vocab_size)]
    for id, (piece, kind) in enumerate(pieces[: config.vocab_size]):
        model.pieces.add(piece=piece, score=-float(id), type=kind)
    spec = model.trainer_spec
    spec.model_type, spec.vocab_size, spec.byte_fallback = spec.BPE, config.vocab_size, True
    spec.pad_id, spec.unk_id, spec.eos_id, spec.bos_id = config.pad_token, 1, config.eos_token, -1
    model.normalizer_spec.name = "identity"
    path.write_bytes(model.SerializeToString())
