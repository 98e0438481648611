"""EleutherAI's evaluation harness, `lm_eval`: choices by their probability, generated text, perplexity."""

from __future__ import annotations

import json
import math
import os
import pathlib
import subprocess
import sys

import httpx

URL = os.environ["GROKMESH_HTTP"]
TASKS = pathlib.Path(__file__).parent / "tasks"
#: Each text is read behind it. Grok-1 has a token for a text's beginning, though xAI's code puts none there.
PREFIX = 1


def _evaluate(folder: pathlib.Path) -> dict:
    """What the harness finds, by task."""
    options = {
        "model": "demo", "base_url": f"{URL}/v1/completions", "tokenizer_backend": "remote", "tokenized_requests": True,
        "custom_prefix_token_id": PREFIX, "num_concurrent": 4,
    }  # fmt: skip
    command = [
        pathlib.Path(sys.executable).with_name("lm_eval"), "--model", "local-completions", "--include_path", TASKS,
        "--tasks", "grokmesh_choice,grokmesh_generate,grokmesh_rolling", "--output_path", folder, "--log_samples",
        "--model_args", ",".join(f"{name}={value}" for name, value in options.items()),
    ]  # fmt: skip
    away = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(folder / "cache")}
    done = subprocess.run(command, env={**os.environ, **away}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (results,) = folder.glob("**/results_*.json")
    answers = {file.name.split("_2")[0]: file.read_text() for file in folder.glob("**/samples_*.jsonl")}
    return {"results": json.loads(results.read_text())["results"], "answers": answers}


def test_the_harness_finds_what_the_service_says_and_twice_the_same(tmp_path):
    found = _evaluate(tmp_path / "first")
    assert found["results"]["grokmesh_choice"]["acc,none"] == 1.0
    assert found == _evaluate(tmp_path / "second")
    text = json.loads((TASKS / "text.jsonl").read_text())["text"]
    tokens = httpx.post(f"{URL}/tokenize", json={"prompt": text}).json()["tokens"]
    asked = {"model": "demo", "prompt": [PREFIX, *tokens], "max_tokens": 0, "echo": True, "logprobs": 1}
    (choice,) = httpx.post(f"{URL}/v1/completions", json=asked).json()["choices"]
    probability = sum(choice["logprobs"]["token_logprobs"][1:])
    words, bytes_ = len(text.split()), len(text.encode())
    rolling = found["results"]["grokmesh_rolling"]
    assert math.isclose(rolling["word_perplexity,none"], math.exp(-probability / words), rel_tol=1e-6)
    assert math.isclose(rolling["bits_per_byte,none"], -probability / bytes_ / math.log(2), rel_tol=1e-6)
