"""Scores of prompts' tokens: what generation says of the same tokens, whatever else the engine does."""

from __future__ import annotations

import dataclasses
import json

import jax
import numpy as np
import pytest

from tests.conftest import GOLDEN
from tests.workers.runtime.test_runtime import NATIVE, VOCAB, make_requests, make_runtime
from workers.engine.scheduler import Scheduler
from workers.kernels.interface import ACCELERATOR, PORTABLE
from workers.messages.plan import Chunk, Plan, Sampling, Score, SlotStart
from workers.messages.request import Request, ScoreEvent, TokenEvent
from workers.runtime.runtime import Runtime

pytestmark = pytest.mark.slow


@pytest.fixture(
    scope="module",
    params=[
        (2, 2, "tensor", NATIVE),
        (2, 1, "batch", NATIVE),
        (2, 1, "batch", PORTABLE),
        (2, 2, "tensor", ACCELERATOR),
    ],
    ids=["tensor-native", "batch-native", "batch", "tensor-accelerator"],
)
def runtime(request: pytest.FixtureRequest) -> Runtime:
    return make_runtime(*request.param)


class _Engine:
    """A scheduler of its own on a runtime: an empty cache, and what requests get."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime, self.scheduler = runtime, Scheduler(runtime.shape, VOCAB, 64)

    def run(self, *requests: Request) -> tuple[dict[str, list[Score]], dict[str, list[TokenEvent]]]:
        """Scores and tokens of each request."""
        scores: dict[str, list[ScoreEvent]] = {request.id: [] for request in requests}
        tokens: dict[str, list[TokenEvent]] = {request.id: [] for request in requests}
        for request in requests:
            self.scheduler.submit(request)
        while (plan := self.scheduler.plan()) is not None:
            events = self.scheduler.complete(self._runtime.read(self._runtime.execute(plan)))
            for scored in self.scheduler.scores():
                assert not tokens[scored.request_id]
                scores[scored.request_id].append(scored)
            for event in events:
                tokens[event.request_id].append(event)
            self.scheduler.check_integrity()
        assert self.scheduler.load.running == 0
        for request in requests:
            ended = [event.done for event in scores[request.id]]
            assert not any(ended[:-1])
            assert ended[-1:] in ([], [request.max_tokens == 0])
        return {name: [s for event in events for s in event.scores] for name, events in scores.items()}, tokens


def _scored(name: str, tokens: tuple[int, ...], start: int = 1, top: int = 3) -> Request:
    return Request(name, tokens, 0, Sampling(top_logprobs=top), score_from=start)


TEXT = make_requests(1, 5)[0].prompt[:5] + tuple(range(40, 90))


def _same(runtime: Runtime, scores: list[Score], others: list[Score]) -> None:
    """They are equal: bit for bit where kernels are batch-invariant."""
    if runtime.shape.batch_invariant:
        assert scores == others
        return
    np.testing.assert_allclose([s.logprob for s in scores], [s.logprob for s in others], atol=1e-4)


def test_scores_are_those_of_the_logits(runtime: Runtime) -> None:
    prompt = TEXT[:16]
    scores, tokens = _Engine(runtime).run(_scored("a", prompt))
    assert tokens == {"a": []}
    start = SlotStart(0, tuple(range(1, 1 + runtime.shape.table_width)), Sampling())
    logits, _ = runtime.logits(Plan(1, (start,), ((Chunk(0, 0, prompt, last=False),),), ()))
    expected = np.asarray(jax.nn.log_softmax(logits))[:-1]
    own = expected[np.arange(15), prompt[1:]]
    np.testing.assert_allclose([score.logprob for score in scores["a"]], own, atol=1e-4)
    assert [score.rank for score in scores["a"]] == (1 + (expected > own[:, None]).sum(axis=1)).tolist()
    most = np.argsort(-expected, axis=1, kind="stable")[:, :3]
    assert [[id for id, _ in score.top] for score in scores["a"]] == most.tolist()


def test_scores_are_those_of_the_golden_set(runtime: Runtime) -> None:
    engine = _Engine(runtime)
    with np.load(GOLDEN / "text-s1" / "exact.npz") as exact:
        for case in json.loads((GOLDEN / "text-s1" / "cases.json").read_text())["forward"]:
            name, prompt = f"forward/{case['name']}", tuple(case["prompt"])
            if not 1 < len(prompt) <= runtime.shape.context:
                continue
            expected = np.asarray(jax.nn.log_softmax(exact[f"{name}/logits"]))[np.arange(len(prompt) - 1), prompt[1:]]
            # Behind a router's close call both of its choices are right.
            clear = np.logical_and.accumulate(exact[f"{name}/router_gap"] > 1e-3)[:-1]
            scores, _ = engine.run(_scored(name, prompt))
            error = np.abs(np.array([score.logprob for score in scores[name]]) - expected)[clear]
            assert error.max(initial=0.0) < 1e-3, name


def test_generated_tokens_are_scored_as_they_were_drawn(runtime: Runtime) -> None:
    generated = Request("a", TEXT[:20], 30, Sampling(temperature=1.0, seed=3, top_logprobs=3))
    drawn = [event.token for event in _Engine(runtime).run(generated)[1]["a"]]
    whole = (*generated.prompt, *(token.id for token in drawn))
    scores = _Engine(runtime).run(_scored("a", whole, 20))[0]["a"]
    _same(runtime, [dataclasses.replace(s, rank=0) for s in scores], [Score(t.logprob, 0, t.top) for t in drawn])


def test_a_prompt_gets_the_same_scores_alone_and_in_any_company(runtime: Runtime) -> None:
    asked = [_scored(f"s{i}", TEXT[i:], 1 + 7 * i) for i in range(5)]
    together, _ = _Engine(runtime).run(*make_requests(12, 3), *asked)
    for request in asked:
        _same(runtime, _Engine(runtime).run(request)[0][request.id], together[request.id])


def test_continuations_share_the_pages_of_their_context(runtime: Runtime) -> None:
    engine, context = _Engine(runtime), TEXT[:33]
    asked = [_scored(f"s{i}", (*context, 7 + i, 11), 33) for i in range(4)]
    scores, _ = engine.run(*asked)
    assert engine.scheduler.counts.prompt_tokens_cached >= 3 * 32 - 3 * runtime.shape.page_size
    for request in asked:
        alone = _Engine(runtime).run(request)[0][request.id]
        assert len(alone) == 2
        _same(runtime, scores[request.id], alone)


def test_what_is_cached_is_computed_again_where_it_is_scored(runtime: Runtime) -> None:
    engine = _Engine(runtime)
    first, _ = engine.run(_scored("a", TEXT))
    second, _ = engine.run(_scored("a", TEXT))
    _same(runtime, first["a"], second["a"])
    assert engine.scheduler.counts.prompt_tokens_cached == 0


def test_a_completion_comes_with_the_scores_of_its_prompt(runtime: Runtime) -> None:
    plain = Request("a", TEXT[:37], 12, Sampling(temperature=1.0, seed=9))
    scores, tokens = _Engine(runtime).run(dataclasses.replace(plain, score_from=4))
    _same(runtime, scores["a"], _Engine(runtime).run(_scored("a", plain.prompt, 4, top=0))[0]["a"])
    assert [e.token for e in tokens["a"]] == [e.token for e in _Engine(runtime).run(plain)[1]["a"]]


def test_the_longest_prompt_is_scored_whole(runtime: Runtime) -> None:
    prompt = tuple(5 + i % 60 for i in range(runtime.shape.context))
    assert len(_Engine(runtime).run(_scored("a", prompt))[0]["a"]) == runtime.shape.context - 1
