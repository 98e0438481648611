"""One table of all parameters: names, shapes, types and logical axes, in the order of xAI's checkpoint.

Initialisation, sharding, loading and `grokmesh inspect` all read this table.
"""

from __future__ import annotations

import dataclasses
import math

from workers.model.config import GrokConfig

Axes = tuple[str | None, ...]

#: Groups of rows with scales of their own, where the release has them.
SCALE_GROUPS = 8
#: Rows of such a group of a weight in 4 bits.
INT4_ROWS = 128


@dataclasses.dataclass(frozen=True)
class ParameterInfo:
    """What is known of a parameter before its bytes are.

    Attributes:
      path: Haiku module and parameter name, joined by `/`, as in xAI's tree.
      shape: of the values, scales not counted.
      axes: one logical axis a dimension; `workers.model.partition` maps them to mesh axes.
      quantized: whether the release stores it as int8 with scales.
      grouped: whether the release has several groups of rows a column (8), not one.
    """

    path: str
    shape: tuple[int, ...]
    axes: Axes
    quantized: bool = False
    grouped: bool = False

    @property
    def size(self) -> int:
        """Number of values."""
        return math.prod(self.shape)


def parameter_table(config: GrokConfig) -> tuple[ParameterInfo, ...]:
    """All parameters of a model, in checkpoint order: embedding, final norm, then layers in **lexicographic** order."""
    d, f, e, c = config.emb_size, config.ffn_size, config.num_experts, config.key_size
    q, kv = config.num_q_heads * c, config.num_kv_heads * c
    table = [
        ParameterInfo("language_model/in_out_embed/embeddings", (config.vocab_size, d), ("vocab", "table_embed")),
        ParameterInfo("language_model/rms_norm/scale", (d,), (None,)),
    ]
    for layer in sorted(range(config.num_layers), key=str):
        prefix = f"transformer/decoder_layer_{layer}"
        attention = f"{prefix}/multi_head_attention"
        table += [
            ParameterInfo(f"{prefix}/moe/linear/w", (e, d, f), ("expert", "embed", "ffn"), True),
            ParameterInfo(f"{prefix}/moe/linear_1/w", (e, f, d), ("expert", "ffn", "embed"), True, True),
            ParameterInfo(f"{prefix}/moe/linear_v/w", (e, d, f), ("expert", "embed", "ffn"), True),
            ParameterInfo(f"{attention}/key/w", (d, kv), ("embed", "kv_heads"), True),
            ParameterInfo(f"{attention}/linear/w", (q, d), ("q_heads", "embed"), True, True),
            ParameterInfo(f"{attention}/query/w", (d, q), ("embed", "q_heads"), True),
            ParameterInfo(f"{attention}/value/w", (d, kv), ("embed", "kv_heads"), True),
            *(
                ParameterInfo(f"{prefix}/{norm}/scale", (d,), (None,))
                for norm in ("rms_norm", "rms_norm_1", "rms_norm_2", "rms_norm_3")
            ),
            ParameterInfo(f"{prefix}/router/w", (d, e), ("router_embed", None)),
        ]
    return tuple(table)
