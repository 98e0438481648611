"""How a model lies on a mesh: which mesh axes each logical axis is split over. Plain arithmetic."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

from workers.kernels.int4 import INT4_ROWS
from workers.model.config import GrokConfig
from workers.model.parameters import Axes, ParameterInfo

MeshAxes = tuple[str, ...]

#: Logical axis -> mesh axes, a table a name. An axis that a table does not name is not split.
#:   tensor: every weight over all devices by heads or by expert width; each device sees every sequence. Two sums of
#:     activations a layer are all that crosses hosts. The KV heads must divide over all devices.
#:   batch: sequences (and their KV pages) over `data`, heads over `model`, expert width over both: for meshes with more
#:     devices than KV heads.
#:   xai: the rules that xAI published, where weights are split over `data` along the embedding too.
RULES: Mapping[str, Mapping[str, MeshAxes]] = {
    "tensor": {
        "q_heads": ("data", "model"),
        "kv_heads": ("data", "model"),
        "ffn": ("data", "model"),
        "vocab": ("data", "model"),
    },
    "batch": {
        "batch": ("data",),
        "q_heads": ("model",),
        "kv_heads": ("model",),
        "ffn": ("data", "model"),
        "vocab": ("data", "model"),
    },
    "xai": {
        "batch": ("data",),
        "embed": ("data",),
        "router_embed": ("data",),
        "q_heads": ("model",),
        "kv_heads": ("model",),
        "ffn": ("model",),
        "table_embed": ("data", "model"),
    },
}


@dataclasses.dataclass(frozen=True)
class Layout:
    """The rules by which a model lies on a mesh.

    Attributes:
      sizes: devices along each mesh axis; empty where there is no mesh, and nothing is split.
      units: of a logical axis, what must stay whole; see `Partition.create`.
      rules: a table of RULES.
    """

    sizes: Mapping[str, int]
    units: Mapping[str, int]
    rules: Mapping[str, MeshAxes]

    @classmethod
    def of(cls, config: GrokConfig, sizes: Mapping[str, int], rules: str) -> Layout:
        """The layout of a model on a mesh of these sizes."""
        return cls(sizes, units(config), RULES[rules])

    def axes(self, name: str | None) -> MeshAxes:
        """The mesh axes that the logical axis `name` is split over: none where they don't divide it, or are of one device."""
        if name is None:
            return ()
        axes = self.rules.get(name, ())
        unit = self.units.get(name)
        ways = self.ways(axes)
        return axes if ways > 1 and (unit is None or unit % ways == 0) else ()

    def ways(self, axes: MeshAxes) -> int:
        """The number of parts that splitting over `axes` makes."""
        return math.prod(self.sizes.get(axis, 1) for axis in axes)

    @property
    def batch_groups(self) -> int:
        """The number of parts that the rows of a batch are split into."""
        return self.ways(self.axes("batch"))

    def scale_groups(self, groups: int, row_axis: str | None) -> int:
        """The number of scale groups to keep of a weight with `groups`, so that each part of its rows has whole ones.

        One group stays one, as its scales factor out of any sum over rows. Otherwise it is the least common multiple
        of `groups` and the number of parts: groups are divided by repeating their scales.
        """
        return 1 if groups == 1 else math.lcm(groups, self.ways(self.axes(row_axis)))

    def scale_axes(self, groups: int, axes: Axes) -> Axes:
        """The logical axes of the scales of a weight with `groups` groups (after `scale_groups`) and logical `axes`."""
        return (*axes[:-2], None if groups == 1 else axes[-2], axes[-1])

    def int4_groups(self, info: ParameterInfo) -> int:
        """Groups of rows with scales of their own, of a weight in 4 bits: INT4_ROWS each, or as many as divide a device's."""
        rows = info.shape[-2]
        return rows // math.gcd(INT4_ROWS, rows // self.ways(self.axes(info.axes[-2])))

    def local(self, shape: tuple[int, ...], axes: Axes) -> tuple[int, ...]:
        """What one device holds of an array of `shape` whose first dimensions are the logical `axes`."""
        parts = [self.ways(self.axes(name)) for name in axes]
        return tuple(size // ways for size, ways in zip(shape, [*parts, *[1] * (len(shape) - len(parts))], strict=True))


def units(config: GrokConfig) -> dict[str, int]:
    """What of each logical axis must divide over devices: a query head lies beside its key head, so these decide for both."""
    return {
        "q_heads": config.num_kv_heads,
        "kv_heads": config.num_kv_heads,
        "ffn": config.ffn_size,
        "vocab": config.vocab_size,
        "embed": config.emb_size,
        "router_embed": config.emb_size,
        "table_embed": config.emb_size,
    }
