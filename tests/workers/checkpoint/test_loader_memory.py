"""Loading needs little more memory than what it loads."""

from __future__ import annotations

import json
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from tools.checkpoint_writer import write_array, write_quantized
from workers.model.config import GrokConfig
from workers.model.parameters import parameter_table

pytestmark = pytest.mark.slow

SHAPE = {
    "emb_size": 512, "num_layers": 12, "num_q_heads": 8, "num_kv_heads": 4, "key_size": 64, "ffn_size": 1024,
    "vocab_size": 4096,
}  # fmt: skip

#: Loads the checkpoint in a fresh process; prints what it loaded and the largest extra memory it had at any time.
MEASURE = """
import pathlib, re, sys
import jax
jax.config.update("jax_platforms", "cpu")
from workers.checkpoint.checkpoint import open_checkpoint
from workers.checkpoint.loader import load_parameters
from workers.model.partition import Partition
from workers.runtime.mesh import make_mesh

def status(name):
    return int(re.search(name + r":\\s+(\\d+) kB", pathlib.Path("/proc/self/status").read_text())[1]) * 1024

checkpoint = open_checkpoint(pathlib.Path(sys.argv[1]))
partition = Partition.create(checkpoint.config, make_mesh(1, 1))
jax.block_until_ready(jax.device_put(1.0))
pathlib.Path("/proc/self/clear_refs").write_text("5")  # the peak starts from here
before = status("VmRSS")
params, progress = load_parameters(checkpoint, partition)
print(progress.read, status("VmHWM") - before - progress.read)
"""


def test_extra_memory_is_under_15_percent_of_the_shard(tmp_path: pathlib.Path) -> None:
    config = GrokConfig(**SHAPE)
    (tmp_path / "ckpt-0").mkdir()
    (tmp_path / "config.json").write_text(json.dumps(SHAPE))
    rng = np.random.default_rng(0)
    for i, info in enumerate(parameter_table(config)):
        path = tmp_path / "ckpt-0" / f"tensor{i:05d}_000"
        if info.quantized:
            weight = rng.integers(-127, 128, info.shape, np.int8)
            write_quantized(path, weight, np.ones((*info.shape[:-2], 8, info.shape[-1]), np.float32))
        else:
            write_array(path, np.ones(info.shape, np.float32))
    result = subprocess.run([sys.executable, "-c", MEASURE, str(tmp_path)], capture_output=True, text=True, check=True)
    loaded, extra = map(int, result.stdout.split())
    print(f"{loaded:,} bytes loaded, {extra:,} extra at the peak")
    assert loaded > 150_000_000
    assert extra < 0.15 * loaded
