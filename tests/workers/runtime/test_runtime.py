"""The engine on a mesh: the same request gives the same tokens whatever happens beside it, and nothing compiles."""

from __future__ import annotations

import dataclasses
import itertools
import json
import pathlib
import random
import threading
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from tests.conftest import GOLDEN
from tools.checkpoint_writer import write_array, write_quantized
from workers.checkpoint.checkpoint import Checkpoint, open_checkpoint
from workers.checkpoint.loader import load_parameters
from workers.engine.scheduler import Counts, Scheduler
from workers.kernels.cpu.kernels import native_kernels
from workers.kernels.interface import ACCELERATOR, PORTABLE, Kernels
from workers.messages.plan import Chunk, DecodeRow, EngineShape, Plan, Sampling, SlotStart, Token
from workers.messages.request import Request
from workers.model.config import GrokConfig
from workers.model.parameters import parameter_table
from workers.model.partition import Partition
from workers.runtime.program_set import ProgramSet
from workers.runtime.runtime import Pending, Runtime

pytestmark = pytest.mark.slow

CHECKPOINT = open_checkpoint(GOLDEN / "text-s1")
VOCAB = CHECKPOINT.config.vocab_size
NATIVE = native_kernels()


def make_runtime(
    data: int, model: int, rules: str, kernels: Kernels, config: GrokConfig = CHECKPOINT.config
) -> Runtime:
    """An engine with the trained golden model, or with its weights under another configuration."""
    mesh = Mesh(np.array(jax.devices()[: data * model]).reshape(data, model), ("data", "model"))
    partition = Partition.create(config, mesh, rules, kernels)
    params, _ = load_parameters(CHECKPOINT, partition)
    shape = EngineShape(
        slots=8,
        groups=partition.batch_groups,
        pages=40,
        page_size=8,
        chunk=16,
        context=96,
        batch_invariant=kernels.batch_invariant,
    )
    runtime = Runtime(ProgramSet(config, shape, partition, params), partition)
    runtime.set_parameters(params)
    runtime.warm_up()
    return runtime


@pytest.fixture(
    scope="module",
    params=[
        (2, 2, "tensor", PORTABLE),
        (2, 1, "batch", PORTABLE),
        (2, 2, "tensor", NATIVE),
        (2, 1, "batch", NATIVE),
        (2, 1, "batch", ACCELERATOR),
    ],
    ids=["tensor", "batch", "tensor-native", "batch-native", "batch-accelerator"],
)
def runtime(request: pytest.FixtureRequest) -> Runtime:
    """Engines whose rows lie on all devices, and whose rows are split over two groups."""
    return make_runtime(*request.param)


def make_requests(count: int, seed: int) -> list[Request]:
    """Requests of all kinds, some of which begin alike or repeat themselves."""
    rng = random.Random(seed)
    made: list[Request] = []
    for i in range(count):
        sampling = Sampling(
            temperature=rng.choice([0.0, 0.8, 1.5]),
            top_p=rng.choice([1.0, 0.7]),
            top_k=rng.choice([0, 0, 5]),
            seed=rng.getrandbits(64),
            logit_bias=((rng.randrange(VOCAB), 3.0),) if i % 4 == 0 else (),
            allowed_tokens=tuple(range(100, 400)) if i % 5 == 0 else (),
            min_p=rng.choice([0.0, 0.1]),
            repetition_penalty=1.3 if i % 7 == 0 else 1.0,
            frequency_penalty=0.5 if i % 9 == 0 else 0.0,
            top_logprobs=i % 9,
        )
        prompt = tuple(rng.randrange(3, VOCAB) for _ in range(rng.randint(1, 60)))
        if i % 3 == 1:
            prompt = (*made[-1].prompt[:30], *prompt[:20])
        if i % 6 == 2:
            prompt = prompt[:7] * 8
        request = Request(f"r{i}", prompt, rng.randint(1, 20), sampling)
        if i % 4 == 3:  # half of all tokens would end it
            ending = {"stop_tokens": frozenset(range(0, VOCAB, 2)), "min_tokens": rng.randint(1, 9)}
            request = dataclasses.replace(request, sampling=dataclasses.replace(sampling, masked=True), **ending)  # type: ignore[arg-type]
        made.append(request)
    return made


def run(
    runtime: Runtime, requests: list[Request], rng: random.Random | None = None, counts: Counts | None = None
) -> dict[str, list[Token]]:
    """All tokens of requests that arrive together or, given `rng`, at random times, one step ahead of the devices."""
    scheduler = Scheduler(runtime.shape, VOCAB, len(requests))
    scheduler.counts = counts or scheduler.counts
    waiting, tokens = list(requests), {request.id: list[Token]() for request in requests}
    pending: Pending | None = None
    while True:
        while waiting and (rng is None or rng.random() < 0.5):
            scheduler.submit(waiting.pop())
        plan = scheduler.plan()
        dispatched = runtime.execute(plan) if plan else None
        if pending is not None:
            for event in scheduler.complete(runtime.read(pending)):
                tokens[event.request_id].append(event.token)
        pending = dispatched
        if pending is None and not waiting and not scheduler.load.running:
            break
    assert scheduler.load.pages_used == 0
    return tokens


def test_a_request_gets_the_same_bits_alone_and_in_any_company(runtime: Runtime) -> None:
    requests = make_requests(24, seed=1)
    compiled: list[str] = []
    jax.monitoring.register_event_duration_secs_listener(lambda event, duration_secs, **_: compiled.append(event))
    alone = {request.id: run(runtime, [request])[request.id] for request in requests}
    for seed in range(3):
        rng = random.Random(seed)
        rng.shuffle(requests)
        together = run(runtime, requests, rng)
        assert together == alone  # tokens, logprobs and alternatives, bit for bit
    assert "/jax/core/compile/backend_compile_duration" not in compiled


def test_every_token_is_counted_once_for_each_chosen_expert_of_each_layer(runtime: Runtime) -> None:
    config, scheduler = runtime.config, Scheduler(runtime.shape, VOCAB, 8)
    for request in make_requests(6, seed=4):
        scheduler.submit(request)
    groups = config.layer_groups()
    while (plan := scheduler.plan()) is not None:
        tokens = runtime.read(runtime.execute(plan))
        computed = plan.prompt_tokens + plan.decode_rows
        expected = [computed * config.num_selected_experts * len(group) for group in groups]
        assert [sum(counts) for counts in tokens.expert_tokens] == expected
        assert all(
            max(counts) <= computed * len(group) for counts, group in zip(tokens.expert_tokens, groups, strict=True)
        )
        scheduler.complete(tokens)


def test_the_devices_hold_what_is_told(runtime: Runtime) -> None:
    held = runtime.device_bytes
    assert held["parameters"] >= 0.9 * CHECKPOINT.nbytes  # native kernels keep the table in 16 bits
    assert held["kv_pages"] > held["sampling"] > 0
    assert runtime.probe() > 0


def test_a_resumed_completion_goes_on_with_the_same_bits(runtime: Runtime) -> None:
    """With penalties, biases and all: tokens, logprobs and alternatives."""
    requests = [request for request in make_requests(20, seed=7) if request.max_tokens > 1]
    whole = run(runtime, requests)
    rng = random.Random(0)
    rests = []
    for request in requests:
        known = rng.randrange(len(whole[request.id]))
        rests.append(dataclasses.replace(request, resumed=tuple(token.id for token in whole[request.id][:known])))
    tokens = run(runtime, rests, rng)
    for rest in rests:
        assert tokens[rest.id] == whole[rest.id][len(rest.resumed) :]


def test_who_is_preempted_for_want_of_pages_gets_the_same_bits_later(runtime: Runtime) -> None:
    requests = [
        dataclasses.replace(request, max_tokens=runtime.shape.context - len(request.prompt))
        for request in make_requests(12, seed=9)
    ]
    alone = {request.id: run(runtime, [request])[request.id] for request in requests}
    counts = Counts()
    assert run(runtime, requests, counts=counts) == alone
    assert counts.preemptions > 0


def test_a_mask_is_gone_from_a_slot_with_its_request(runtime: Runtime) -> None:
    prompt = tuple(range(60, 80))
    free = Request("free", prompt, 8, Sampling())
    before = run(runtime, [free])["free"]
    masked = run(runtime, [Request("masked", prompt, 8, Sampling(allowed_tokens=(7, 9)))])["masked"]
    assert {token.id for token in masked} <= {7, 9}
    assert run(runtime, [free])["free"] == before


def _odd_checkpoint(directory: pathlib.Path) -> Checkpoint:
    """Random weights in a shape that no mesh of two, three, four or eight devices divides."""
    shape = {
        "emb_size": 90, "num_layers": 2, "num_q_heads": 6, "num_kv_heads": 2, "key_size": 10, "ffn_size": 120,
        "vocab_size": 1003, "num_experts": 5, "num_selected_experts": 2, "sequence_len": 50,
        "embedding_multiplier_scale": 9.0, "attn_output_multiplier": 0.3,
    }  # fmt: skip
    (directory / "ckpt-0").mkdir()
    (directory / "config.json").write_text(json.dumps(shape))
    rng = np.random.default_rng(0)
    for i, info in enumerate(parameter_table(GrokConfig.from_json(shape))):
        path = directory / "ckpt-0" / f"tensor{i:05d}_000"
        if info.quantized:
            groups = 5 if info.grouped and info.shape[-2] % 5 == 0 else 1
            scales = rng.uniform(0.001, 0.003, (*info.shape[:-2], groups, info.shape[-1])).astype(np.float32)
            write_quantized(path, rng.integers(-127, 128, info.shape, np.int8), scales)
        else:
            write_array(path, rng.standard_normal(info.shape, np.float32) * 0.3)
    return open_checkpoint(directory)


def test_shapes_that_divide_nothing_give_the_same_numbers_on_any_mesh(tmp_path: pathlib.Path) -> None:
    checkpoint = _odd_checkpoint(tmp_path)
    prompt = tuple(random.Random(0).randrange(1003) for _ in range(14))
    logits = []
    for data, model, rules in [(1, 1, "tensor"), (1, 8, "tensor"), (2, 2, "batch"), (3, 2, "xai")]:
        mesh = Mesh(np.array(jax.devices()[: data * model]).reshape(data, model), ("data", "model"))
        partition = Partition.create(checkpoint.config, mesh, rules)
        params, _ = load_parameters(checkpoint, partition)
        groups = partition.batch_groups
        shape = EngineShape(slots=6, groups=groups, pages=20, page_size=7, chunk=14, context=50)
        runtime = Runtime(ProgramSet(checkpoint.config, shape, partition, params), partition)
        runtime.set_parameters(params)
        runtime.warm_up()
        start_ = SlotStart(0, tuple(range(1, 1 + shape.table_width)), Sampling())
        chunk = Chunk(0, 0, prompt, last=False)
        logits.append(runtime.logits(Plan(1, (start_,), ((chunk,),), ()))[0])
    for other in logits[1:]:
        np.testing.assert_allclose(other, logits[0], atol=1e-4 * logits[0].std())


def _logits(runtime: Runtime, prompt: tuple[int, ...], cuts: list[int]) -> np.ndarray:
    """Logits of all positions of a prompt that is cut there."""
    start_ = SlotStart(0, tuple(range(1, 1 + runtime.shape.table_width)), Sampling())
    parts = []
    for start, end in itertools.pairwise([0, *cuts, len(prompt)]):
        chunk = Chunk(0, start, prompt[start:end], last=False)
        parts.append(runtime.logits(Plan(1, (start_,) if start == 0 else (), ((chunk,),), ()))[0])
    return np.concatenate(parts)


@pytest.mark.parametrize("change", [{"attn_logit_cap": 2.0}, {"rope_base": 300.0}, {"norm_epsilon": 0.5}], ids=str)
def test_kernels_compute_with_the_numbers_of_the_configuration(change: dict[str, Any]) -> None:
    prompt = tuple(range(50, 80))
    config = dataclasses.replace(CHECKPOINT.config, **change)
    native, plain = (_logits(make_runtime(1, 1, "tensor", k, config), prompt, [16]) for k in (NATIVE, PORTABLE))
    released = _logits(make_runtime(1, 1, "tensor", PORTABLE), prompt, [16])
    np.testing.assert_allclose(native, plain, atol=0.02 * plain.std())
    assert np.abs(plain - released).max() > 0.1 * released.std()


def test_native_kernels_give_the_same_bits_wherever_a_prompt_is_cut() -> None:
    runtime = make_runtime(2, 2, "tensor", NATIVE)
    prompt = tuple(range(50, 80))
    whole = _logits(runtime, prompt, [16])
    for cuts in ([1, 2, 18], [15, 29], [7, 14, 21, 28]):
        np.testing.assert_array_equal(_logits(runtime, prompt, cuts), whole)


def test_an_accelerator_is_given_plans_while_an_earlier_one_is_being_launched() -> None:
    """Its programs may need the host until they are nearly done; what goes wrong with one, its reader gets."""
    runtime = make_runtime(1, 1, "tensor", ACCELERATOR)
    go, decode = threading.Event(), runtime._decode

    def late(*arguments: Any) -> Any:
        assert go.wait(60)
        return decode(*arguments)

    runtime._decode = late
    start = SlotStart(0, tuple(range(1, 1 + runtime.shape.table_width)), Sampling())
    first = runtime.execute(Plan(1, (start,), ((Chunk(0, 0, (5, 6, 7), last=True),),), ()))
    steps = [runtime.execute(Plan(2 + step, (), (), (DecodeRow(0, 3 + step),))) for step in range(2)]
    assert len(runtime.read(first).prefilled) == 1
    go.set()
    drawn = [runtime.read(step).decoded[0][0] for step in steps]
    runtime._decode = decode
    again = runtime.execute(Plan(4, (start,), ((Chunk(0, 0, (5, 6, 7), last=True),),), ()))
    assert runtime.read(again).prefilled == runtime.read(first).prefilled
    assert [runtime.read(runtime.execute(step.plan)).decoded[0][0] for step in steps] == drawn

    runtime._decode = None
    with pytest.raises(TypeError):
        runtime.read(runtime.execute(Plan(5, (), (), (DecodeRow(0, 3),))))
