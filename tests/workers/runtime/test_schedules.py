"""The same request gives the same bits under any schedule: alone and in company, in any order of arrival, wherever its prompt
is cut, whether or not its prefix is cached, guessed or not, however many steps are planned at once.

GROKMESH_SCHEDULES sets how many random schedules are tried; `make determinism` tries thousands.
"""

from __future__ import annotations

import collections
import dataclasses
import os
import random

import pytest

from tests.workers.runtime.test_runtime import NATIVE, VOCAB, make_requests, make_runtime, run
from workers.engine.scheduler import Scheduler
from workers.messages.plan import Sampling, Token
from workers.messages.request import Request
from workers.runtime.runtime import Pending, Runtime

pytestmark = pytest.mark.slow

SCHEDULES = int(os.environ.get("GROKMESH_SCHEDULES", "12"))
REQUESTS = 64

#: The model goes on as they do.
REPETITIVE = [
    Request(f"again{i}", tuple(range(100 + i, 104 + i)) * 10, 50, Sampling(temperature=0.3 * i, seed=i))
    for i in range(4)
]


@pytest.fixture(scope="module")
def runtime() -> Runtime:
    return make_runtime(2, 2, "tensor", NATIVE)


def _schedule(
    runtime: Runtime, requests: list[Request], rng: random.Random
) -> tuple[dict[str, list[Token]], Scheduler]:
    """Tokens of requests that arrive at random, some of which are cancelled on the way."""
    scheduler = Scheduler(runtime.shape, VOCAB, len(requests), steps=rng.choice([1, 1, 2, 5]))
    waiting, tokens = list(requests), {request.id: list[Token]() for request in requests}
    in_flight: collections.deque[Pending] = collections.deque()
    eager, cancelling, depth = rng.random(), rng.choice([0.0, 0.02]), rng.choice([1, 2])
    while waiting or in_flight or scheduler.load.running or scheduler.load.waiting:
        while waiting and rng.random() < eager:
            scheduler.submit(dataclasses.replace(waiting.pop(), trial=rng.random() < 0.05))
        if rng.random() < cancelling:
            scheduler.cancel(rng.choice(requests).id)
        plan = scheduler.plan(rng.randint(1, runtime.shape.chunk))
        if plan is not None:
            in_flight.append(runtime.execute(plan))
        if in_flight and (plan is None or len(in_flight) >= depth):
            for event in scheduler.complete(runtime.read(in_flight.popleft())):
                tokens[event.request_id].append(event.token)
    scheduler.check_integrity()
    assert scheduler.load.pages_used == 0
    return tokens, scheduler


def test_no_schedule_changes_a_bit(runtime: Runtime) -> None:
    requests = [*make_requests(REQUESTS - len(REPETITIVE), seed=11), *REPETITIVE]
    alone = {request.id: run(runtime, [request])[request.id] for request in requests}
    cached = guessed = 0
    for seed in range(SCHEDULES):
        rng = random.Random(seed)
        chosen = rng.sample(requests, REQUESTS if seed % 10 == 0 else rng.randint(1, 16))
        if seed % 3 == 1:  # few enough for guesses
            chosen = rng.sample(REPETITIVE, 2)
        tokens, scheduler = _schedule(runtime, chosen, rng)
        for request in chosen:
            got = tokens[request.id]  # a cancelled one has fewer
            assert got == alone[request.id][: len(got)], f"schedule {seed}, request {request.id}"
        cached += scheduler.counts.prompt_tokens_cached
        guessed += scheduler.counts.guesses_right
    assert cached > 0
    assert guessed > 0
