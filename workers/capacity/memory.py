"""Bytes that a model, its cache and its programs take on each device."""

from __future__ import annotations

import dataclasses
import math

from workers.messages.plan import MAX_DRAFT, MAX_VERIFIED, SCORED_ROWS
from workers.model.config import GrokConfig
from workers.model.layout import Layout
from workers.model.parameters import ParameterInfo, parameter_table
from workers.model.weight_format import ITEM_BYTES, WeightFormat, release_source

#: Bytes of a value, as the world counts them: without the scales of fewer bits.
VALUE_BYTES = {"float32": 4.0, "bfloat16": 2.0, "int8": 1.0, "int8-unrounded": 1.0, "int4": 0.5}
#: Of programs on each device beside what is counted below: their code, and what the compiler keeps for itself.
PROGRAM_BYTES = 80 * 2**20
#: Rows that prompts are filled up to, for each expert.
BLOCK_ROWS = 256


@dataclasses.dataclass(frozen=True)
class Precision:
    """How a model is kept: names as in `cluster.config.ModelSpec`."""

    weights: str = "int8"
    activations: str = "bfloat16"
    kv_cache: str = "bfloat16"


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on each device, by what they are for.

    Attributes:
      experts, attention, table, rest: of the parameters, scales with what they belong to; `rest` are norms and routers.
      kv_pages: of the cache.
      sampling: biases, counts and masks of all slots.
      programs: what computing takes for a while.
    """

    experts: float
    attention: float
    table: float
    rest: float
    kv_pages: float
    sampling: float
    programs: float

    @property
    def weights(self) -> float:
        return self.experts + self.attention + self.table + self.rest

    @property
    def total(self) -> float:
        return self.weights + self.kv_pages + self.sampling + self.programs


def part_of(info: ParameterInfo) -> str:
    """Which part of a model's memory a parameter is: a name of `Memory`."""
    if "/moe/" in info.path:
        return "experts"
    if "/multi_head_attention/" in info.path:
        return "attention"
    return "table" if info.path.endswith("embeddings") else "rest"


def whole_bytes(config: GrokConfig, weights: str) -> float:
    """Bytes of all parameters at so many bytes a value: what is meant by `314 GB in 8 bits`."""
    return sum(info.size for info in parameter_table(config)) * VALUE_BYTES[weights]


def parameter_bytes(info: ParameterInfo, layout: Layout, precision: Precision, platform: str) -> float:
    """Bytes that one device holds of a parameter."""
    packed = platform == "cpu" and precision.weights.startswith("int")
    kept = WeightFormat(precision.weights, precision.activations, packed).stored(info, release_source(info), layout)
    return sum(math.prod(layout.local(a.shape, a.axes)) * ITEM_BYTES[a.dtype] for a in kept.arrays)


def kv_bytes_per_token(config: GrokConfig, kv_cache: str) -> float:
    """Bytes of the keys and values of one position, over all layers and heads."""
    per_head = config.key_size * VALUE_BYTES[kv_cache] + (4 if kv_cache == "int8" else 0)
    return 2 * config.num_layers * config.num_kv_heads * per_head


def memory(
    config: GrokConfig,
    layout: Layout,
    precision: Precision,
    platform: str,
    *,
    slots: int,
    pages: int,
    page_size: int,
    chunk: int,
    program: str | None = None,
) -> Memory:
    """What each device needs for a model laid out so, with `slots` sequences and `pages` KV pages in each batch group, while it
    runs `program`, or whichever needs more."""
    parts = dict.fromkeys(("experts", "attention", "table", "rest"), 0.0)
    for info in parameter_table(config):
        parts[part_of(info)] += parameter_bytes(info, layout, precision, platform)
    heads = layout.ways(layout.axes("kv_heads"))
    cache = kv_bytes_per_token(config, precision.kv_cache) / heads * pages * page_size
    sampling = slots * (config.vocab_size * 8 + -(-config.vocab_size // 32) * 4)
    return Memory(
        **parts, kv_pages=cache, sampling=sampling, programs=program_bytes(config, layout, slots, chunk, program)
    )


def program_bytes(config: GrokConfig, layout: Layout, slots: int, chunk: int, program: str | None = None) -> float:
    """What `decode`, `verify`, `prefill`, `score`, or the largest of them, takes while it runs.

    Decoding: each device's part of the logits, a few times, and so of guesses' and of scored positions'. Prefill: the rows of
    each chosen expert, filled up to blocks, as they go in and come out, in bfloat16. Scoring needs those before the logits.
    """
    devices, groups = math.prod(layout.sizes.values()), layout.batch_groups

    def logits(rows: int) -> float:
        return 4 * -(-rows // devices) * config.vocab_size * 4

    rows = chunk * groups * config.num_selected_experts
    prefill = (rows + BLOCK_ROWS * (config.num_experts - 1)) * config.emb_size * 4
    programs = {
        "decode": logits(slots),
        "verify": logits(groups * MAX_VERIFIED * (1 + MAX_DRAFT)),
        "prefill": prefill,
        "score": max(prefill, logits(groups * math.gcd(chunk, SCORED_ROWS))),
    }
    return PROGRAM_BYTES + (programs[program] if program else max(programs.values()))
