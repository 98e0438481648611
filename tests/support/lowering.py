"""The programs of Grok-1 at its own size, lowered for accelerators that are not here."""

from __future__ import annotations

import re
from typing import Any

import jax.numpy as jnp
from jax.sharding import AbstractMesh

from tools.aot.release import release_headers
from workers.checkpoint.loader import parameter_shapes
from workers.kernels.interface import Kernels
from workers.messages.plan import EngineShape
from workers.model.config import GrokConfig
from workers.model.partition import Partition
from workers.runtime.program_set import ProgramSet


def layer_loop(kernels: Kernels, mesh: AbstractMesh, platform: str, program: str, kv_dtype: Any) -> str:
    """The loop over the layers in StableHLO, with the functions that it calls."""
    config = GrokConfig()
    partition = Partition.create(config, mesh, "batch", kernels)
    params = parameter_shapes(release_headers(config), partition, dtype=jnp.bfloat16)
    groups = partition.batch_groups
    shape = EngineShape(64, groups, 64 // groups * 128 + 1, 64, 512, 8192, kernels.batch_invariant)
    programs = ProgramSet(config, shape, partition, params, jnp.bfloat16, kv_dtype)
    text = programs.trace(program).lower(lowering_platforms=(platform,)).as_text()
    functions = {part.split("(", 1)[0]: part for part in text.split("func.func private @")[1:]}
    loop = text[text.index("stablehlo.while") :]
    end = re.search(r"\n    }\n(?! *do)", loop)
    assert end is not None
    taken, found = [loop[: end.end()]], set[str]()
    while taken[-1]:
        called = set(re.findall(r"\bcall @(\w+)", taken[-1])) - found
        found |= called
        taken.append("".join(functions[name] for name in sorted(called)))
    return "".join(taken)
