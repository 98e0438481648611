"""Steps of some layers of Grok-1 in full width on one device: `python -m tools.bench.slice`.

For an accelerator whose memory does not hold the whole model. Weights are random and made on the device; a step reads what it
would read of the same layers of the real model, but which experts are chosen differs. `--part 8` takes the part that one of 8
devices has of a layer, so that more layers fit; sums over devices are left out.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import pathlib
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from tools.aot.release import release_headers
from tools.bench.limits import best_of
from tools.bench.steps import Steps, prompt_flops, step_bytes
from workers.checkpoint.loader import Params, parameter_shapes
from workers.host.kernel_selection import hold_to_promise
from workers.kernels.cpu.kernels import native_kernels
from workers.kernels.gpu.kernels import GPU
from workers.kernels.interface import ACCELERATOR, Kernels
from workers.kernels.tpu.kernels import kernels_for
from workers.messages.plan import EngineShape
from workers.model.config import GrokConfig
from workers.model.partition import Partition
from workers.runtime.mesh import AXES, TYPES
from workers.runtime.program_set import ProgramSet
from workers.runtime.runtime import Runtime

_PAGE, _STEPS, _READINGS = 64, 24, 8


def kernels_of(device: jax.Device) -> Kernels:
    """Those that workers choose for a device. Raises NativeKernelsError if a CPU host has none."""
    if device.platform == "tpu":
        return kernels_for(device.device_kind)
    return native_kernels() if device.platform == "cpu" else GPU


def layers_of(config: GrokConfig, layers: int, part: int) -> GrokConfig:
    """Some layers of a model, of which a device has one of `part` parts."""
    divided = ("ffn_size", "num_q_heads", "num_kv_heads", "vocab_size")
    return dataclasses.replace(config, num_layers=layers, **{name: getattr(config, name) // part for name in divided})


def random_parameters(shapes: Params) -> Params:
    """Parameters of these shapes on the device, of about the size that trained ones have."""
    made = iter(range(1 << 20))

    def one(path: Any, array: Any) -> jax.Array:
        key, name = jax.random.key(next(made), impl="rbg"), jax.tree_util.keystr(path)
        if array.dtype == jnp.int8:
            drawn: jax.Array = _random_bytes(key, array.shape)
            return drawn
        if name.endswith(".scales"):
            return jax.random.uniform(key, array.shape, jnp.float32, 1e-4, 3e-4).astype(array.dtype)
        if "scale" in name:
            return jnp.ones(array.shape, array.dtype)
        return (jax.random.normal(key, array.shape) * 0.02).astype(array.dtype)

    parameters: Params = jax.tree_util.tree_map_with_path(one, shapes)
    return parameters


@functools.partial(jax.jit, static_argnums=1)
def _random_bytes(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    def matrix(i: jax.Array) -> Any:
        return jax.lax.bitcast_convert_type(
            jax.random.bits(jax.random.fold_in(key, i), shape[-2:], jnp.uint8), jnp.int8
        )

    drawn: jax.Array = jax.lax.map(matrix, jnp.arange(int(np.prod(shape[:-2])))).reshape(shape)
    return drawn


def read_bandwidth(size: int) -> float:
    """Bytes a second that the device reads of an array of so many bytes; the best of some times, each of several readings that
    wait for the host only once."""
    x = jnp.ones(size // 4, jnp.float32)
    total = jax.jit(jnp.sum)
    return _READINGS * size / best_of(lambda: [total(x) for _ in range(_READINGS)][-1].block_until_ready())


def make_steps(config: GrokConfig, kernels: Kernels, *, slots: int, past: int, prompt: int, chunk: int) -> Steps:
    """A runtime of random weights on the first device, ready to compute: steps of up to `slots` sequences that share `past`
    positions, and a prompt in chunks."""
    dtype: Any = jnp.bfloat16 if kernels.accelerator else jnp.float32
    context = max(past + 2 * _PAGE, prompt)
    pages = 1 + -(-context // _PAGE) + 3 * slots
    shape = EngineShape(slots, 1, pages, _PAGE, chunk, context, kernels.batch_invariant)
    mesh = Mesh(np.array(jax.local_devices()[:1]).reshape(1, 1), AXES, axis_types=TYPES)
    partition = Partition.create(config, mesh, "batch", kernels)
    shapes = parameter_shapes(release_headers(config), partition, dtype=dtype)
    shape, partition = hold_to_promise(config, shape, partition, shapes, dtype)
    runtime = Runtime(ProgramSet(config, shape, partition, shapes, dtype, dtype), partition)
    runtime.set_parameters(random_parameters(shapes))
    runtime.warm_up()
    return Steps(runtime)


def main() -> int:
    """Prints a line a measurement, and writes them as JSON if asked to."""
    parser = argparse.ArgumentParser(prog="python -m tools.bench.slice", description=__doc__)
    parser.add_argument("--config", type=pathlib.Path, help="config.json of another model than Grok-1")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--part", type=int, default=1, help="devices over which the layers are thought to be split")
    parser.add_argument("--slots", type=int, default=64, help="sequences for which the step is compiled")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--past", type=int, default=4096, help="positions of each sequence")
    parser.add_argument("--prompt", type=int, default=8192, help="positions of the prompt")
    parser.add_argument("--chunk", type=int, default=2048)
    parser.add_argument("--read", type=int, default=8 << 30, help="bytes by which the bandwidth is measured")
    parser.add_argument("--plain", action="store_true", help="without kernels of the platform's own")
    parser.add_argument("--output", type=pathlib.Path, help="JSON file to write")
    arguments = parser.parse_args()
    device = jax.devices()[0]
    bandwidth = read_bandwidth(arguments.read)
    config = layers_of(
        GrokConfig.load(arguments.config) if arguments.config else GrokConfig(), arguments.layers, arguments.part
    )
    kernels = ACCELERATOR if arguments.plain else kernels_of(device)
    a = arguments
    steps = make_steps(config, kernels, slots=a.slots, past=a.past, prompt=a.prompt, chunk=a.chunk)
    print(
        f"{device.device_kind}, {bandwidth / 1e9:.0f} GB/s read, kernels {kernels.name}, jax {jax.__version__}: "
        f"{config.num_layers} layers, 1 of {arguments.part} parts"
    )
    figures: dict[str, Any] = {"device": device.device_kind, "bandwidth": bandwidth, "kernels": kernels.name}
    for batch in arguments.batch:
        seconds, experts = steps.decode(batch, arguments.past, _STEPS)
        read = step_bytes(config, experts, batch * (arguments.past + _STEPS // 2), 2, 2 if kernels.accelerator else 4)
        share = read / seconds / bandwidth
        print(f"decode, batch {batch}: {seconds * 1e3:.2f} ms, {read / 1e9:.1f} GB, {share:.1%} of the bandwidth")
        figures[f"decode {batch}"] = {"seconds": seconds, "bytes": read, "share": share}
    page_list = tuple(range(1, 1 + -(-arguments.prompt // _PAGE)))
    seconds = min(steps.prefill(0, page_list, arguments.prompt) for _ in range(2))
    rate = prompt_flops(config) * arguments.prompt / seconds
    print(f"prefill of {arguments.prompt}: {seconds:.3f} s, {rate / 1e12:.1f} useful TFLOP/s")
    figures["prefill"] = {"seconds": seconds, "flops": rate}
    if arguments.output:
        arguments.output.write_text(json.dumps(figures, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
