"""The shape and the multipliers of a Grok-1 model."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from collections.abc import Mapping
from typing import Any, Protocol


class Readable(Protocol):
    """A file, wherever it is."""

    def read_text(self) -> str: ...

    @property
    def parent(self) -> object: ...


#: Exponentials of logits that lie within twice this can be added in float32 without a running maximum.
MOST_LOGIT_CAP = 40.0


class ConfigError(ValueError):
    """A model configuration that no Grok-1 model can have."""


def ffn_size(emb_size: int, widening_factor: float) -> int:
    """Hidden width of one expert: two thirds of the widened embedding, rounded up to a multiple of 8.

    The formula is that of xAI's release, where 6144 wide and a factor of 8 give 32,768.
    """
    size = int(widening_factor * emb_size) * 2 // 3
    return size + (8 - size) % 8


@dataclasses.dataclass(frozen=True)
class GrokConfig:
    """Everything that decides a Grok-1 model's numbers. The defaults are the 314-billion-parameter release.

    Glossary of shapes used throughout `workers.model`:
      B: sequences, T: positions of a sequence in this call, D: emb_size, F: ffn_size, E: num_experts,
      S: num_selected_experts, H: num_q_heads, K: num_kv_heads, C: key_size, V: vocab_size.
    """

    emb_size: int = 6144
    num_layers: int = 64
    num_q_heads: int = 48
    num_kv_heads: int = 8
    key_size: int = 128
    ffn_size: int = 32768
    vocab_size: int = 128 * 1024
    num_experts: int = 8
    num_selected_experts: int = 2
    sequence_len: int = 8192
    embedding_multiplier_scale: float = 78.38367176906169
    output_multiplier_scale: float = 0.5773502691896257
    attn_output_multiplier: float = 0.08838834764831845
    attn_logit_cap: float = 30.0
    rope_base: float = 10_000.0
    norm_epsilon: float = 1e-5
    pad_token: int = 0
    eos_token: int = 2

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name in ("pad_token", "eos_token"):
                if not 0 <= value < self.vocab_size:
                    raise ConfigError(f"{field.name}={value} is outside the vocabulary of {self.vocab_size}")
            elif not (math.isfinite(value) and value > 0):
                raise ConfigError(f"{field.name}={value} must be a positive number")
        if self.num_q_heads % self.num_kv_heads:
            raise ConfigError(f"num_q_heads={self.num_q_heads} is not a multiple of num_kv_heads={self.num_kv_heads}")
        if self.num_selected_experts > self.num_experts:
            raise ConfigError(
                f"num_selected_experts={self.num_selected_experts} exceeds num_experts={self.num_experts}"
            )
        if self.attn_logit_cap > MOST_LOGIT_CAP:
            raise ConfigError(f"attn_logit_cap={self.attn_logit_cap} exceeds {MOST_LOGIT_CAP}")
        if self.key_size % 2:
            raise ConfigError(f"key_size={self.key_size} must be even: rotary embeddings turn pairs")

    def layer_groups(self, most: int = 8) -> list[range]:
        """The layers in at most `most` groups of consecutive ones of nearly equal size, for reports."""
        count = min(most, self.num_layers)
        bounds = [i * self.num_layers // count for i in range(count + 1)]
        return [range(first, end) for first, end in itertools.pairwise(bounds)]

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> GrokConfig:
        """Reads the fields of a `config.json`. `ffn_size` may be given as `widening_factor`; other keys are ignored.

        Raises:
          ConfigError: a required shape is missing, or a value is not of the field's type.
        """
        fields = {f.name: f for f in dataclasses.fields(cls)}
        known: dict[str, Any] = {}
        for name, value in values.items():
            if name not in fields:
                continue
            wanted: type = float if fields[name].type == "float" else int
            if (
                isinstance(value, bool)
                or not isinstance(value, (int, float))
                or not math.isfinite(value)
                or wanted(value) != value
            ):
                raise ConfigError(
                    f"config.json: {name}={value!r} is not {'an integer' if wanted is int else 'a number'}"
                )
            known[name] = wanted(value)
        shapes = ("emb_size", "num_layers", "num_q_heads", "num_kv_heads", "key_size", "vocab_size")
        missing = [name for name in shapes if name not in known]
        if missing:
            raise ConfigError(f"config.json: missing {', '.join(missing)}")
        if "ffn_size" not in known:
            factor = values.get("widening_factor")
            if isinstance(factor, bool) or not isinstance(factor, (int, float)) or not math.isfinite(factor):
                raise ConfigError("config.json: needs ffn_size or widening_factor")
            known["ffn_size"] = ffn_size(known["emb_size"], factor)
        return cls(**known)

    @classmethod
    def load(cls, path: Readable) -> GrokConfig:
        """Reads `path`, a `config.json`. Raises ConfigError when it is no JSON object or does not describe a model."""
        try:
            values = json.loads(path.read_text())
        except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
            raise ConfigError(f"{path}: {error}") from error
        if not isinstance(values, dict):
            raise ConfigError(f"{path}: expected a JSON object")
        try:
            return cls.from_json(values)
        except ConfigError as error:
            raise ConfigError(
                f"{path.parent}/{error}" if str(error).startswith("config.json") else f"{path}: {error}"
            ) from error
