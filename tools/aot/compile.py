"""The programs of a whole model, compiled for hardware that is not here: `python -m tools.aot.compile`.

One program a process, since a compiler that runs out of memory may take its process along. Prints one line of JSON.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from typing import Any

from tools.aot import hlo
from tools.aot.report import NO_COMPILER, AotReport, Engine, NoCompilerError
from workers.capacity.hardware import Hardware, gpu_hosts, tpu_slice
from workers.capacity.memory import Precision
from workers.model.config import GrokConfig

#: The H100 SXM as XLA's compiler wants to know it.
_H100 = """
gpu_device_info {
  cuda_compute_capability { major: 9 minor: 0 }
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  shared_memory_per_block: 49152 shared_memory_per_core: 233472 shared_memory_per_block_optin: 232448
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 3350000000000 l2_cache_size: 52428800 device_memory_size: 85045477376
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 8 patch: 0 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


def compile_program(
    config: GrokConfig,
    hardware: Hardware,
    mesh: tuple[int, int, str],
    precision: Precision,
    program: str,
    engine: Engine,
) -> AotReport:
    """Compiles a program for a TPU slice or for NVIDIA GPUs. The process must not have imported JAX.

    Raises:
      NoCompilerError: the platform's compiler is not installed.
    """
    import jax

    from tools.aot.release import release_headers
    from workers.checkpoint.loader import parameter_shapes
    from workers.host.kernel_selection import hold_to_promise
    from workers.host.standby import DTYPES
    from workers.kernels.gpu.kernels import GPU
    from workers.kernels.tpu.kernels import kernels_for
    from workers.messages.plan import EngineShape
    from workers.model.partition import Partition
    from workers.runtime.kv_cache import page_axes, page_shapes
    from workers.runtime.program_set import ProgramSet

    data, model, rules = mesh
    devices = _mesh(hardware, data, model)
    kernels = kernels_for(devices.devices.flat[0].device_kind) if hardware.device.platform == "tpu" else GPU
    partition = Partition.create(config, devices, rules, kernels)
    shape = EngineShape(
        engine.slots,
        partition.batch_groups,
        engine.pages,
        engine.page_size,
        engine.chunk,
        engine.context,
        kernels.batch_invariant,
    )
    dtype, kv_dtype = DTYPES[precision.activations], DTYPES[precision.kv_cache]
    params = parameter_shapes(release_headers(config), partition, weights=precision.weights, dtype=dtype)
    shape, partition = hold_to_promise(config, shape, partition, params, kv_dtype)
    program_set = ProgramSet(config, shape, partition, params, dtype, kv_dtype)
    lowered = program_set.trace(program).lower()
    began = time.monotonic()
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        problem = str(error).splitlines()[0]
        if "RESOURCE_EXHAUSTED" not in problem:
            raise
        return AotReport(program, False, problem)
    seconds = time.monotonic() - began
    analysis: Any = compiled.memory_analysis()
    text = compiled.as_text() or ""
    local = config.emb_size * config.ffn_size // partition.ways(partition.axes("ffn"))
    pages_axes = page_axes(partition)
    updated = {
        tuple(size for size in partition.local(array.shape, pages_axes) if size != 1)
        for array in jax.tree.leaves(page_shapes(config, shape, partition, kv_dtype))
    }
    temporaries = int(analysis.temp_size_in_bytes)
    peak = getattr(analysis, "peak_memory_in_bytes", 0) or (
        analysis.argument_size_in_bytes + temporaries + analysis.output_size_in_bytes - analysis.alias_size_in_bytes
    )
    return AotReport(
        program,
        peak <= hardware.device.memory,
        "" if peak <= hardware.device.memory else "more than a device has",
        int(analysis.argument_size_in_bytes),
        temporaries,
        int(peak),
        hlo.collectives(text),
        hlo.large_buffers(text, local, updated),
        round(seconds, 1),
        _versions(jax, hardware),
    )


def _mesh(hardware: Hardware, data: int, model: int) -> Any:
    import importlib.util

    import numpy as np
    from jax.experimental import mesh_utils, topologies
    from jax.sharding import Mesh

    from workers.runtime.mesh import AXES, TYPES

    package = "libtpu" if hardware.device.platform == "tpu" else "jax_plugins.xla_cuda13"
    try:
        found = importlib.util.find_spec(package)
    except ModuleNotFoundError:
        found = None
    if found is None:
        raise NoCompilerError(f"{package} is not installed: `make aot` brings what compiles for TPUs and GPUs")
    if hardware.device.platform == "tpu":
        options = {"chip_config_name": "megacore"} if hardware.device.name == "v4" else {}
        described = topologies.get_topology_desc(platform="tpu", topology_name=str(hardware), **options)
        devices = mesh_utils.create_device_mesh((data, model), described.devices, allow_split_physical_axes=True)
    else:
        if hardware.device.name != "H100":
            raise NoCompilerError(f"the compiler's target is H100 only, not {hardware.device.name}")
        per_host = hardware.devices // hardware.hosts
        described = topologies.get_topology_desc(
            platform="cuda", target_config=_H100, topology=f"1x{hardware.hosts}x{per_host}"
        )
        devices = np.array(described.devices).reshape(data, model)
    return Mesh(devices, AXES, axis_types=TYPES)


def _versions(jax: Any, hardware: Hardware) -> str:
    import importlib.metadata

    package = "libtpu" if hardware.device.platform == "tpu" else "jax-cuda13-pjrt"
    return f"jax {jax.__version__}, {package} {importlib.metadata.version(package)}"


def main() -> int:
    """Compiles what the JSON on standard input asks for."""
    parser = argparse.ArgumentParser(prog="python -m tools.aot.compile", description=__doc__)
    parser.parse_args()
    asked: dict[str, Any] = json.load(sys.stdin)
    hardware = tpu_slice(asked["topology"]) if asked.get("topology") else gpu_hosts(asked["gpus"], asked["hosts"])
    try:
        report = _compile(asked, hardware)
    except NoCompilerError as error:
        print(error, file=sys.stderr)
        return NO_COMPILER
    print(json.dumps(dataclasses.asdict(report)))
    return 0


def _compile(asked: dict[str, Any], hardware: Hardware) -> AotReport:
    return compile_program(
        GrokConfig(**asked["model"]),
        hardware,
        tuple(asked["mesh"]),
        Precision(**asked["precision"]),
        asked["program"],
        Engine(**asked["engine"]),
    )


if __name__ == "__main__":
    sys.exit(main())
