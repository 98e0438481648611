"""The benchmark of some layers on one device."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import subprocess
import sys

import pytest

from tools.bench.slice import layers_of
from tools.bench.steps import prompt_flops, step_bytes
from workers.kernels.cpu.kernels import native_kernels
from workers.model.config import GrokConfig

CONFIG = GrokConfig(
    emb_size=64, num_layers=4, num_q_heads=4, num_kv_heads=2, key_size=16, ffn_size=128, vocab_size=256, num_experts=4
)


def test_a_step_of_grok_1_reads_what_its_papers_say() -> None:
    """84 GB for one token, which meets 2 experts of each of 64 layers; 262,144 bytes of keys and values a position."""
    config = GrokConfig()
    assert step_bytes(config, 128, 0, 2, 2) == pytest.approx(84.1e9, rel=0.01)
    assert step_bytes(config, 0, 1, 2, 2) - step_bytes(config, 0, 0, 2, 2) == 262144
    assert prompt_flops(config) == pytest.approx(2 * 83e9, rel=0.02)


def test_a_part_of_some_layers_has_that_part_of_every_width() -> None:
    part = layers_of(CONFIG, 3, 2)
    assert (
        dataclasses.replace(part, num_layers=4, num_q_heads=4, num_kv_heads=2, ffn_size=128, vocab_size=256) == CONFIG
    )
    assert (part.num_layers, part.num_q_heads, part.num_kv_heads, part.ffn_size, part.vocab_size) == (3, 2, 1, 64, 128)


@pytest.mark.slow
def test_it_measures_a_small_model_on_a_cpu(tmp_path: pathlib.Path) -> None:
    config, output = tmp_path / "config.json", tmp_path / "figures.json"
    config.write_text(json.dumps(dataclasses.asdict(CONFIG)))
    sizes = [
        "--layers",
        "2",
        "--slots",
        "4",
        "--batch",
        "1",
        "3",
        "--past",
        "128",
        "--prompt",
        "100",
        "--chunk",
        "64",
        "--read",
        "50000000",
    ]
    command = [sys.executable, "-m", "tools.bench.slice", "--config", str(config), "--output", str(output), *sizes]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1"}
    subprocess.run(command, check=True, env=environment, timeout=300)
    figures = json.loads(output.read_text())
    assert figures["kernels"] == native_kernels().name
    assert figures["decode 3"]["bytes"] > figures["decode 1"]["bytes"]
    assert min(figures["decode 1"]["share"], figures["prefill"]["flops"], figures["bandwidth"]) > 0
