"""Trains the demo model in `models/demo` and writes it in xAI's on-disk format.

    tools/training/demo_corpus.sh /tmp/corpus
    python tools/training/train_demo_model.py --corpus /tmp/corpus --output models/demo

The same corpus, seed and number of steps give the same model up to the rounding of the machine's arithmetic.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import math
import pathlib
import re
import time
from collections.abc import Iterator
from typing import Any

import haiku as hk
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import sentencepiece

from tools.checkpoint_writer import write_array, write_quantized
from workers.checkpoint.checkpoint import open_checkpoint
from workers.checkpoint.loader import load_parameters
from workers.kernels.interface import PORTABLE
from workers.kernels.weights import LayerWeight, Weight
from workers.kernels.xla import portable
from workers.model.config import GrokConfig
from workers.model.grok import causal_forward
from workers.model.parameters import EMBEDDING, ParameterInfo, parameter_table
from workers.model.partition import Partition
from workers.runtime.mesh import make_mesh

LENGTH = 256  # positions of a training sequence
BATCH = 8  # sequences of a step
BALANCE = 0.01  # weight of the load-balancing loss
HELD_OUT = 0.05  # share of the text, at the end of each source, kept for validation
SCALE_GROUPS = 8
Params = dict[str, dict[str, Any]]


def documents(corpus: pathlib.Path) -> tuple[list[str], list[str]]:
    """Training and validation documents: chapters of the Bible, plays and poems of Shakespeare."""
    chapters: dict[str, list[str]] = {}
    for line in (corpus / "bible.txt").read_text().splitlines():
        match = re.match(r"(\w+?\d+):\d+ (.*)", line)
        if match:
            chapters.setdefault(match[1], []).append(match[2])
    bible = ["\n".join(verses) for verses in chapters.values()]
    plays = []
    for path in sorted((corpus / "plays").glob("*.txt")):
        text = path.read_text(encoding="latin-1").replace("\r", "").expandtabs(1)
        text = re.sub(r" +", " ", re.sub(r" *\n *", "\n", text))
        plays.append(re.sub(r"\n{3,}", "\n\n", text).strip())
    train, held_out = [], []
    for source in (bible, plays):
        last = sum(map(len, source)) * (1 - HELD_OUT)
        seen = 0
        for document in source:
            cut = max(0, min(len(document), int(last) - seen))
            seen += len(document)
            train += [document[:cut]] if cut else []
            held_out += [document[cut:]] if cut < len(document) else []
    return train, held_out


def train_tokenizer(texts: list[str], config: GrokConfig, output: pathlib.Path) -> sentencepiece.SentencePieceProcessor:
    """A SentencePiece model with byte fallback, whose pad, unknown and end tokens are 0, 1 and 2."""
    with output.open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter([line for text in texts for line in text.split("\n") if line]),
            model_writer=file,
            vocab_size=config.vocab_size,
            model_type="unigram",
            byte_fallback=True,
            character_coverage=0.9999,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            pad_id=config.pad_token,
            unk_id=1,
            eos_id=config.eos_token,
            bos_id=-1,
            num_threads=2,
            minloglevel=1,
        )
    return sentencepiece.SentencePieceProcessor(model_file=str(output))


def encode(tokenizer: sentencepiece.SentencePieceProcessor, texts: list[str], eos: int) -> np.ndarray[Any, Any]:
    """All documents as one row of tokens, an end token after each."""
    return np.array([token for text in texts for token in (*tokenizer.encode(text), eos)], np.int32)


def batched_experts(x: jax.Array, weight: Weight, group_sizes: jax.Array) -> jax.Array:
    """`grouped_matmul` with a gradient: the experts' matrices are gathered for fixed blocks of rows."""
    weight = weight.taken() if isinstance(weight, LayerWeight) else weight
    assert isinstance(weight, jax.Array)
    rows, block = x.shape[0], 128
    count = rows // block + weight.shape[0]
    blocks = -(-group_sizes // block)
    last_block = jnp.cumsum(blocks)
    first_row = jnp.cumsum(group_sizes) - group_sizes
    index = jnp.arange(count)
    group = jnp.minimum(jnp.searchsorted(last_block, index, side="right", method="compare_all"), weight.shape[0] - 1)
    offset = (index - (last_block - blocks)[group])[:, None] * block + jnp.arange(block)  # [count, block]
    inside = (offset < group_sizes[group][:, None]) & (index < last_block[-1])[:, None]
    source = jnp.where(inside, first_row[group][:, None] + offset, rows)
    padded = jnp.concatenate([x, jnp.zeros((1, x.shape[1]), x.dtype)])
    products = jnp.einsum("bmk,bkn->bmn", padded[source], weight[group])
    return jnp.zeros((rows, weight.shape[-1])).at[source].set(products, mode="drop")


def batches(tokens: np.ndarray[Any, Any], seed: int) -> Iterator[np.ndarray[Any, Any]]:
    """Endless batches [BATCH, LENGTH + 1]; each epoch cuts the text anew and shuffles the cuts."""
    rng = np.random.default_rng(seed)
    while True:
        start = int(rng.integers(LENGTH))
        rows = (len(tokens) - start - 1) // LENGTH
        order = rng.permutation(rows)
        for i in range(0, rows - BATCH + 1, BATCH):
            first = start + order[i : i + BATCH] * LENGTH
            yield tokens[first[:, None] + np.arange(LENGTH + 1)]


def quantize(weight: np.ndarray[Any, Any], groups: int) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Rounds [..., K, N] to int8 with a bfloat16 scale for each column and group of K // groups rows."""
    *lead, rows, columns = weight.shape
    grouped = weight.reshape(*lead, groups, rows // groups, columns)
    scales = (np.abs(grouped).max(-2) / 127.0).astype(ml_dtypes.bfloat16)  # [..., G, N]
    rounded = np.rint(grouped / np.maximum(scales.astype(np.float32)[..., None, :], 1e-12))
    return np.clip(rounded, -127, 127).astype(np.int8).reshape(weight.shape), scales


def bigram_perplexity(train: np.ndarray[Any, Any], held_out: np.ndarray[Any, Any], vocab: int) -> float:
    """Perplexity of a bigram model, interpolated with a unigram one (weights chosen on the held-out text)."""
    unigram = np.bincount(train, minlength=vocab) + 1.0
    unigram /= unigram.sum()
    pairs = np.zeros((vocab, vocab))
    np.add.at(pairs, (train[:-1], train[1:]), 1.0)
    seen = pairs.sum(1, keepdims=True)
    best = math.inf
    for strength in (1, 3, 10, 30, 100):
        p = (pairs[held_out[:-1], held_out[1:]] + strength * unigram[held_out[1:]]) / (
            seen[held_out[:-1], 0] + strength
        )
        best = min(best, math.exp(-float(np.log(p).mean())))
    return best


def initial_parameters(config: GrokConfig, seed: int) -> Params:
    """Norms of one; matrices [..., K, N] of standard deviation 1 / sqrt(K); what the table embeds to has one of 1."""
    params: Params = {}
    for i, info in enumerate(layer_table(config)):
        module, name = info.place
        deviation = 1.0 / config.embedding_multiplier_scale if info.path == EMBEDDING else info.shape[-2:][0] ** -0.5
        shape = info.shape if info.layer is None else (config.num_layers, *info.shape)
        key = jax.random.fold_in(jax.random.key(seed), i)
        drawn = jax.random.truncated_normal(key, -2.0, 2.0, shape) * deviation
        params.setdefault(module, {})[name] = jnp.ones(shape) if name == "scale" else drawn
    return params


def layer_table(config: GrokConfig) -> list[ParameterInfo]:
    """The parameters of the model's tree: those outside of layers, and those of the first layer, which stand for all."""
    return [info for info in parameter_table(config) if not info.layer]


def read_back(directory: pathlib.Path, config: GrokConfig) -> Params:
    """The parameters of a written checkpoint, widened as the served model sees them."""
    partition = Partition.create(config, make_mesh(1, 1))
    return load_parameters(open_checkpoint(directory), partition, weights="float32")[0]


def main() -> None:
    """Trains, evaluates, writes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--corpus", type=pathlib.Path, required=True)
    parser.add_argument("--output", type=pathlib.Path, required=True)
    parser.add_argument("--steps", type=int, default=2200)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()

    config = GrokConfig.load(arguments.output / "config.json")
    train_texts, held_out_texts = documents(arguments.corpus)
    tokenizer = train_tokenizer(train_texts, config, arguments.output / "tokenizer.model")
    train = encode(tokenizer, train_texts, config.eos_token)
    held_out = encode(tokenizer, held_out_texts, config.eos_token)
    baseline = bigram_perplexity(train, held_out, config.vocab_size)
    print(f"{len(train):,} training tokens, {len(held_out):,} held out; bigram perplexity {baseline:.1f}", flush=True)

    kernels = dataclasses.replace(PORTABLE, experts=functools.partial(portable.experts, multiply=batched_experts))
    model: Any = hk.without_apply_rng(hk.transform(lambda tokens: causal_forward(config, tokens, kernels=kernels)))
    params = initial_parameters(config, arguments.seed)
    schedule = optax.warmup_cosine_decay_schedule(0.0, 2.5e-3, arguments.steps // 20, arguments.steps, 2.5e-5)
    decay = jax.tree.map(lambda leaf: leaf.ndim > 1, params)
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(schedule, b1=0.9, b2=0.98, weight_decay=0.1, mask=decay)
    )

    def loss(params: Params, batch: jax.Array) -> tuple[jax.Array, jax.Array]:
        output = model.apply(params, batch[:, :-1])
        entropy = optax.softmax_cross_entropy_with_integer_labels(output.read, batch[:, 1:]).mean()
        probabilities = output.routed.probabilities  # [L, B, T, E]
        _, chosen = jax.lax.top_k(probabilities, config.num_selected_experts)
        used = jax.nn.one_hot(chosen, config.num_experts).sum(-2).mean((1, 2))  # [L, E]
        balance = (used * probabilities.mean((1, 2))).sum(-1).mean() * config.num_experts / config.num_selected_experts
        return entropy + BALANCE * balance, entropy

    @jax.jit
    def update(params: Params, state: optax.OptState, batch: jax.Array) -> tuple[Params, optax.OptState, jax.Array]:
        (_, entropy), gradient = jax.value_and_grad(loss, has_aux=True)(params, batch)
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state, entropy  # type: ignore[return-value]

    evaluate = jax.jit(lambda params, batch: loss(params, batch)[1])

    def perplexity(params: Params) -> float:
        rows = (len(held_out) - 1) // LENGTH // BATCH * BATCH
        cuts = held_out[np.arange(rows)[:, None] * LENGTH + np.arange(LENGTH + 1)]
        return math.exp(float(np.mean([evaluate(params, cuts[i : i + BATCH]) for i in range(0, rows, BATCH)])))

    state = optimizer.init(params)
    began, smoothed = time.monotonic(), 0.0
    for step, batch in enumerate(batches(train, arguments.seed)):
        if step == arguments.steps:
            break
        params, state, entropy = update(params, state, batch)
        smoothed = float(entropy) if step == 0 else 0.98 * smoothed + 0.02 * float(entropy)
        if step % 50 == 0:
            elapsed = time.monotonic() - began
            print(f"step {step} perplexity {math.exp(smoothed):.1f} ({elapsed:.0f} s)", flush=True)
        if step % 400 == 399:
            print(f"step {step} held-out perplexity {perplexity(params):.2f}", flush=True)

    checkpoint = arguments.output / "ckpt-0"
    checkpoint.mkdir(exist_ok=True)
    for i, info in enumerate(parameter_table(config)):
        module, name = info.place
        values = np.asarray(params[module][name] if info.layer is None else params[module][name][info.layer])
        path = checkpoint / f"tensor{i:05d}_000"
        if info.quantized:
            write_quantized(path, *quantize(values, SCALE_GROUPS if info.grouped else 1))
        else:
            write_array(path, values)
    report = {
        "bigram": round(baseline, 2),
        "float32": round(perplexity(params), 2),
        "int8": round(perplexity(read_back(arguments.output, config)), 2),
        "steps": arguments.steps,
        "training_tokens": len(train),
        "held_out_tokens": len(held_out),
        "minutes": round((time.monotonic() - began) / 60, 1),
    }
    (arguments.output / "perplexity.json").write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report), flush=True)


if __name__ == "__main__":
    main()
