"""The hot operations: one interface, one implementation a kind of platform."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Callable
from typing import Any

import jax

from workers.kernels.kv_pages import Pages
from workers.kernels.packing import Array
from workers.kernels.sampling import SamplingRows, SamplingState, sample, score
from workers.kernels.weights import Weight
from workers.kernels.xla import portable

Arrays = tuple[jax.Array, ...]


@dataclasses.dataclass(frozen=True)
class Packing:
    """Puts weights into the order of the kernels, as `workers.kernels.packing` says it, in arrays that are given.

    Attributes:
      weight: (int8 [..., K, N], groups of rows, values).
      int4: (int8 [..., K, N], its scales [..., G, N] bfloat16, which of the G each row has [K], values, scales): the rounded
        products, quantized again.
      table: (float [V, D], values, scales [V, 1]).
    """

    weight: Callable[[Array, int, Array], None]
    int4: Callable[[Array, Array, Array, Array, Array], None]
    table: Callable[[Array, Array, Array], None]


class Site(enum.IntEnum):
    """Where in a program something crosses between devices. What has the same site never crosses at the same time, and always
    between the same devices."""

    EMBEDDING = 0
    ROWS = 1
    ATTENTION = 2
    EXPERTS = 3
    HIDDEN = 4
    LOGITS = 5
    SAMPLES = 6
    PROBE = 7


@dataclasses.dataclass(frozen=True)
class Group:
    """The devices between which something crosses.

    Attributes:
      site: where.
      rank: [] int32, this device's place in the mesh.
      world: devices of the mesh.
      size: devices of the group.
      stride: how far in the mesh each is from the next.
    """

    site: Site
    rank: jax.Array
    world: int
    size: int
    stride: int


@dataclasses.dataclass(frozen=True)
class Collectives:
    """What crosses between devices, where it isn't for XLA to do. They end with an error when a host of the mesh is lost.

    Attributes:
      sum: (x float32, group) -> x added up, in the order of the devices.
      gather: (x, group) -> [devices, ...], the x of each.
      exchange: (x [B, V / devices], group) -> [B / devices, V]: whole rows for each, of which each has some columns.
    """

    sum: Callable[[jax.Array, Group], jax.Array]
    gather: Callable[[jax.Array, Group], jax.Array]
    exchange: Callable[[jax.Array, Group], jax.Array]


@dataclasses.dataclass(frozen=True)
class Kernels:
    """What a device computes on its own part. M rows of which `valid` [M] are no padding; padding gives anything finite.

    A row's results must not depend on the other rows. Weights are one layer's: `LayerWeight`s among those of all layers.

    Attributes:
      name: the instruction set of native kernels, or gpu, tpu, xla, xla-accelerator.
      norm: (x [M, D], valid, scale [D], residual [M, D] or none, epsilon=) -> [M, D] float32: root-mean-square norm, added
        to `residual`.
      route: (x [M, D], valid, weight [D, E], S) -> gates [M, S], experts [M, S] int32, probabilities [M, E].
      project: (x [M, K], valid, weights [K, N_i]) -> [M, N_i] float32 each.
      experts: (x [M, D], gates, experts, valid, gate, up, down, reduce) -> [M, D]: the sum over the selected experts, of
        this device's part of their width. `reduce` sums both products with D over devices, or is None.
      lookup: (table [V, D], tokens) -> rows; tokens outside of the table give any row.
      logits: (hidden [M, D], valid, table [V, D]) -> [M, V] float32.
      attend: (query [B, T, H, C], key [B, T, K, C], value, key_pages, value_pages, page_table [B, N], positions [B, T],
        scale=, cap=, rope_base=) -> [B, T, H, C], key_pages, value_pages: see `portable.attend`.
      sample: (logits [B, V], state, rows) -> packed samples [B, PACKED_WIDTH]: see `sampling.sample`. The choice of kernels
        decides rounding, not distribution.
      score: (logits [B, V], tokens [B]) -> packed scores [B, PACKED_WIDTH]: see `sampling.score`.
      batch_invariant: whether a row's bits are the same in programs of other shapes, so that prompts may be cut anywhere.
      covers: (parameters, pages of values) -> whether they compute all of such parts of a model themselves, and leave nothing
        to plain XLA: else they are not batch-invariant.
      accelerator: whether the devices are other processors than the host's.
      scatters: whether the devices write single elements of large arrays where they lie; TPUs turn the whole array round.
      heads_first: whether both kinds of pages are [K, P, page, C]; else keys are [P, K, C, page], values [P, K, page, C].
      paired: whether they read 4-bit weights two a byte, as `PairedWeight`s.
      collectives: between the devices; XLA's if None.
      packing: how `PackedWeight`s and the `PackedTable` are made, which the kernels then take. None where weights lie as
        they are.
    """

    name: str
    norm: Callable[..., jax.Array]
    route: Callable[..., tuple[jax.Array, jax.Array, jax.Array]]
    project: Callable[[jax.Array, jax.Array, tuple[Weight, ...]], Arrays]
    experts: Callable[..., jax.Array]
    lookup: Callable[[Any, jax.Array], jax.Array]
    logits: Callable[[jax.Array, jax.Array, Any], jax.Array]
    attend: Callable[..., tuple[jax.Array, Pages, Pages]]
    sample: Callable[[jax.Array, SamplingState, SamplingRows], jax.Array]
    score: Callable[[jax.Array, jax.Array], jax.Array]
    batch_invariant: bool
    covers: Callable[[Any, Any], bool] = lambda _params, _pages: True
    accelerator: bool = False
    scatters: bool = True
    heads_first: bool = False
    paired: bool = False
    collectives: Collectives | None = None
    packing: Packing | None = None

    @property
    def packed(self) -> bool:
        return self.packing is not None


PORTABLE = Kernels(
    name="xla",
    norm=portable.norm,
    route=portable.route,
    project=portable.project,
    experts=portable.experts,
    lookup=portable.lookup,
    logits=portable.logits,
    attend=portable.attend,
    sample=sample,
    score=score,
    batch_invariant=False,
)
#: For accelerators without kernels of their own.
ACCELERATOR = dataclasses.replace(PORTABLE, name="xla-accelerator", accelerator=True, scatters=False)
