"""Whether a request gets the same bits alone, in company, and when it is taken up again, from programs of different shapes."""

from __future__ import annotations

import dataclasses
import random

from tools.selftest.findings import Finding, Outcome
from workers.engine.scheduler import Counts, Scheduler
from workers.messages.plan import Sampling, Token
from workers.messages.request import Request
from workers.runtime.runtime import Runtime

_REQUESTS, _TOKENS = 12, 24
_NAME = "bits, alone and in company"


def compare(runtime: Runtime) -> Finding:
    """Draws the tokens of some requests in different ways."""
    if not runtime.shape.batch_invariant:
        return Finding("layers", _NAME, Outcome.SKIPPED, "these kernels do not promise it for this model")
    requests, counts = _requests(runtime), Counts()
    alone = {request.id: _draw(runtime, [request], counts)[request.id] for request in requests}
    together = _draw(runtime, requests, counts, random.Random(1))
    resumed = [
        dataclasses.replace(request, resumed=tuple(token.id for token in alone[request.id][: _TOKENS // 2]))
        for request in requests
    ]
    later = _draw(runtime, resumed, counts, random.Random(2))
    different = sorted(
        request.id
        for request in requests
        if len(alone[request.id]) != _TOKENS
        or alone[request.id] != together[request.id]
        or alone[request.id][_TOKENS // 2 :] != later[request.id]
    )
    guesses = counts.guesses_right + counts.guesses_wrong
    text = f"{len(requests)} requests of {_TOKENS} tokens, {counts.prompt_tokens_cached} positions shared, {guesses} guesses"
    if different:
        return Finding("layers", _NAME, Outcome.FAILED, f"not the same: requests {', '.join(different)}; {text}")
    return Finding("layers", _NAME, Outcome.OK, f"the same: {text}", {"requests": len(requests), "guesses": guesses})


def _requests(runtime: Runtime) -> list[Request]:
    """Prompts shorter and longer than tiles and chunks, some that begin alike; every kind of draw, some that can be guessed."""
    rng, vocab, shape = random.Random(0), runtime.config.vocab_size, runtime.shape
    longest = min(shape.context - _TOKENS - 1, shape.chunk + shape.page_size)
    made: list[Request] = []
    for i in range(_REQUESTS):
        length = (7, longest // 9, longest // 3, longest)[i % 4]
        prompt = tuple(rng.randrange(vocab) for _ in range(length))
        if i % 3 == 1:
            before = made[-1].prompt
            prompt = (*before[: len(before) * 3 // 4], *prompt)[:longest]
        sampling = Sampling(
            temperature=(0.0, 0.8, 1.2)[i % 3],
            top_p=(1.0, 0.9)[i % 2],
            top_k=(0, 0, 40)[i % 3],
            seed=i,
            logit_bias=((i, 100.0),) if i % 4 == 0 else (),
            top_logprobs=4,
        )
        made.append(Request(str(i), prompt, _TOKENS, sampling))
    return made


def _draw(
    runtime: Runtime, requests: list[Request], counts: Counts, rng: random.Random | None = None
) -> dict[str, list[Token]]:
    """All tokens of requests that come at once or, given `rng`, one after the other, their prompts cut anywhere."""
    scheduler = Scheduler(runtime.shape, runtime.config.vocab_size, len(requests))
    tokens = {request.id: list[Token]() for request in requests}
    scheduler.counts, waiting = counts, list(requests)
    while waiting or scheduler.load.running or scheduler.load.waiting:
        while waiting and (rng is None or rng.random() < 0.5):
            scheduler.submit(waiting.pop())
        plan = scheduler.plan(rng.randint(1, runtime.shape.chunk) if rng else runtime.shape.chunk)
        if plan is not None:
            for event in scheduler.complete(runtime.read(runtime.execute(plan))):
                tokens[event.request_id].append(event.token)
    return tokens
