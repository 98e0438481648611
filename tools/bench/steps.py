"""A runtime driven step by step, without a scheduler: how long steps take, and what they read at least."""

from __future__ import annotations

import dataclasses
import statistics
import time

import numpy as np

from workers.messages.plan import Chunk, DecodeRow, Plan, Sampling, SlotStart
from workers.model.config import GrokConfig
from workers.runtime.runtime import Pending, Runtime

#: Steps before which pipelines are not full yet.
_FIRST = 2


class Steps:
    """Gives a runtime one plan after the other."""

    def __init__(self, runtime: Runtime) -> None:
        self.runtime = runtime
        self._plans = 0

    def prefill(self, slot: int, pages: tuple[int, ...], length: int, known: int = 0, *, scored: bool = False) -> float:
        """Gives a slot `length` positions, of which pages hold the first `known`; seconds that it took. They are `scored`, or
        a token is drawn behind them."""
        shape, vocab = self.runtime.shape, self.runtime.config.vocab_size
        known = min(known, length - 1)
        tokens = tuple(3 + (7 * i + (slot if i >= known else 0)) % (vocab - 3) for i in range(length))
        began = time.perf_counter()
        pending: list[Pending] = []
        for start in range(known, length, shape.chunk):
            taken = tokens[start : start + shape.chunk]
            last = start + shape.chunk >= length
            chunk = Chunk(slot, start, taken, last=last and not scored, scored=taken if scored else ())
            starts = (SlotStart(slot, pages, Sampling()),) if start == known else ()
            pending.append(self._run(Plan(0, starts, ((chunk,),), ())))
        for one in pending:
            self.runtime.read(one)
        return time.perf_counter() - began

    def decode(self, batch: int, positions: int, steps: int) -> tuple[float, int]:
        """Median seconds of a decode step, one step ahead, and the experts that all layers together read in one.

        All sequences have the same past, on pages that they share; each has its own for what comes. Memory sees no difference,
        as the pages of one long sequence are more than caches hold.
        """
        size = self.runtime.shape.page_size
        past, own = positions // size, -(-(steps + size) // size)
        shared = tuple(range(1, 1 + past))
        for slot in range(batch):
            first = 1 + past + slot * own
            self.prefill(slot, (*shared, *range(first, first + own)), positions, 0 if slot == 0 else past * size)
        times: list[float] = []
        dispatched: list[Pending] = []
        for step in range(steps):
            began = time.perf_counter()
            rows = tuple(DecodeRow(slot, positions + step) for slot in range(batch))
            dispatched.append(self._run(Plan(0, (), (), rows)))
            if step:
                self.runtime.read(dispatched[-2])
                times.append(time.perf_counter() - began)
        self.runtime.read(dispatched[-1])
        counts = [count for pending in dispatched for count in pending.launched.result().expert_counts]
        experts = statistics.median(int((np.asarray(count) > 0).sum()) for count in counts)
        return statistics.median(times[_FIRST:]), int(experts)

    def _run(self, plan: Plan) -> Pending:
        self._plans += 1
        return self.runtime.execute(dataclasses.replace(plan, number=self._plans))


def step_bytes(
    config: GrokConfig, experts: int, cached: int, table_bytes: int, kv_bytes: int, weight_bytes: float = 1.0
) -> int:
    """What a decode step reads at least: weights of chosen experts and attention, the table, valid keys and values.

    Args:
      config: of the model.
      experts: chosen ones, of all layers together.
      cached: positions of all sequences together.
      table_bytes, kv_bytes, weight_bytes: of one number.
    """
    c = config
    heads = (2 * c.num_q_heads + 2 * c.num_kv_heads) * c.key_size * c.emb_size * c.num_layers
    cache = 2 * c.num_kv_heads * c.key_size * c.num_layers * kv_bytes * cached
    weights = weight_bytes * (experts * 3 * c.emb_size * c.ffn_size + heads)
    return int(weights) + c.vocab_size * c.emb_size * table_bytes + cache


def prompt_flops(config: GrokConfig) -> float:
    """Useful operations of one prompt position: two for each weight that it meets; the table is met once a prompt."""
    c = config
    heads = (2 * c.num_q_heads + 2 * c.num_kv_heads) * c.key_size * c.emb_size
    return 2.0 * c.num_layers * (heads + c.num_selected_experts * 3 * c.emb_size * c.ffn_size)
