"""One table of all parameters: names, shapes, types and logical axes, in the order of xAI's checkpoint.

Initialisation, sharding, loading and `grokmesh inspect` all read this table.
"""

from __future__ import annotations

import dataclasses
import math

from workers.model.config import GrokConfig

Axes = tuple[str | None, ...]

#: The module that holds the parameters of all layers, stacked.
LAYERS = "decoder_layers"
EMBEDDING = "language_model/in_out_embed/embeddings"

#: Groups of rows with scales of their own, where the release has them.
SCALE_GROUPS = 8


@dataclasses.dataclass(frozen=True)
class ParameterInfo:
    """What is known of a parameter before its bytes are.

    Attributes:
      path: Haiku module and parameter name, joined by `/`, as in xAI's tree.
      shape: of the values, scales not counted.
      axes: one logical axis a dimension; `workers.model.partition` maps them to mesh axes.
      quantized: whether the release stores it as int8 with scales.
      grouped: whether the release has several groups of rows a column (8), not one.
      layer: which decoder layer's it is; None outside of them.
    """

    path: str
    shape: tuple[int, ...]
    axes: Axes
    quantized: bool = False
    grouped: bool = False
    layer: int | None = None

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def place(self) -> tuple[str, str]:
        """Module and name in the model's tree, where the parameters of all layers lie stacked."""
        path = self.path if self.layer is None else self.path.replace(f"decoder_layer_{self.layer}", LAYERS)
        module, name = path.rsplit("/", 1)
        return module, name


def parameter_table(config: GrokConfig) -> tuple[ParameterInfo, ...]:
    """All parameters of a model, in checkpoint order: embedding, final norm, then layers in **lexicographic** order."""
    d, f, e, c = config.emb_size, config.ffn_size, config.num_experts, config.key_size
    q, kv = config.num_q_heads * c, config.num_kv_heads * c
    table = [
        ParameterInfo(EMBEDDING, (config.vocab_size, d), ("vocab", "table_embed")),
        ParameterInfo("language_model/rms_norm/scale", (d,), (None,)),
    ]
    for layer in sorted(range(config.num_layers), key=str):
        prefix = f"transformer/decoder_layer_{layer}"
        table += [
            ParameterInfo(f"{prefix}/{name}", shape, axes, quantized, grouped, layer)
            for name, shape, axes, quantized, grouped in (
                ("moe/linear/w", (e, d, f), (None, "embed", "ffn"), True, False),
                ("moe/linear_1/w", (e, f, d), (None, "ffn", "embed"), True, True),
                ("moe/linear_v/w", (e, d, f), (None, "embed", "ffn"), True, False),
                ("multi_head_attention/key/w", (d, kv), ("embed", "kv_heads"), True, False),
                ("multi_head_attention/linear/w", (q, d), ("q_heads", "embed"), True, True),
                ("multi_head_attention/query/w", (d, q), ("embed", "q_heads"), True, False),
                ("multi_head_attention/value/w", (d, kv), ("embed", "kv_heads"), True, False),
                ("rms_norm/scale", (d,), (None,), False, False),
                ("rms_norm_1/scale", (d,), (None,), False, False),
                ("rms_norm_2/scale", (d,), (None,), False, False),
                ("rms_norm_3/scale", (d,), (None,), False, False),
                ("router/w", (d, e), ("router_embed", None), False, False),
            )
        ]
    return tuple(table)
