"""A mesh that computes nothing, and a leader on it."""

from __future__ import annotations

import contextlib
import threading
import time
import types
from collections.abc import Callable, Iterator
from typing import Any

from tests.support.ports import free_port
from workers.engine.scheduler import Scheduler
from workers.host.leader import Leader
from workers.host.plan_log import PlanLog
from workers.host.streams import LeaderServer, LinkError
from workers.messages.plan import EngineShape, Plan, Score, StepTokens, Token
from workers.model.config import GrokConfig
from workers.runtime.profiler import Profiler
from workers.telemetry.stalls import StallWatch
from workers.text.grammar_job import Constraints
from workers.text.sandbox import Sandbox


class FakeRuntime:
    """Draws `token` for everything, at once or as often as steps take `seconds`."""

    def __init__(self, shape: EngineShape, seconds: float = 0.0, token: int = 5) -> None:
        self.shape = shape
        self._token = token
        self._seconds = seconds
        self.config = GrokConfig(num_layers=2)
        self.host_computes = True

    def execute(self, plan: Plan) -> Any:
        """A plan is pending."""
        return types.SimpleNamespace(plan=plan)

    def read(self, pending: Any) -> StepTokens:
        """Its tokens."""
        time.sleep(self._seconds)
        plan: Plan = pending.plan
        token = Token(self._token, -1.0, ())
        last = [chunk for chunks in plan.prefills for chunk in chunks if chunk.last]
        decoded = ((token,) * plan.steps,) * len(plan.decode)
        drafted = ((token,),) * len(plan.drafts)
        scored = [chunk.scored for chunks in plan.prefills for chunk in chunks if chunk.scored]
        scores = tuple((Score(-2.0, 3, ((self._token, -1.0),)),) * sum(token >= 0 for token in one) for one in scored)
        return StepTokens(plan.number, (token,) * len(last), decoded, drafted, ((1,) * 8, (2,) * 8), scores)

    def wait(self, plan: Plan) -> None:
        """It is done."""

    def probe(self) -> float:
        """A collective takes no time."""
        return 0.0


@contextlib.contextmanager
def leading(
    shape: EngineShape,
    vocab_size: int,
    max_waiting: int,
    seconds: float = 0.0,
    sandbox: Sandbox | None = None,
    stall_seconds: float | None = None,
    stalled: Callable[[str], None] = print,
    ended: Callable[[LinkError], None] = lambda _: None,
    plan_log: PlanLog | None = None,
) -> Iterator[str]:
    """The address of a leader of epoch 1, whose secret is b"s", that serves while the block runs; steps take `seconds`. Only
    with a `sandbox` does it follow grammars."""
    address = f"127.0.0.1:{free_port('127.0.0.1')}"
    runtime: Any = FakeRuntime(shape, seconds)
    server = LeaderServer(address, epoch=1, secret=b"s", silence=1.5)
    scheduler = Scheduler(shape, vocab_size, max_waiting)
    followed: Any = sandbox
    constraints = Constraints(followed, 2 * shape.slots, server.wake)

    def lead() -> None:
        stalls = StallWatch("the leader's loop", stall_seconds, stalled)
        leader = Leader(runtime, scheduler, server, 1, lambda: 0, Profiler(), constraints, stalls, 2.0, plan_log)
        try:
            leader.run()
        except LinkError as error:
            ended(error)

    thread = threading.Thread(target=lead, daemon=True)
    thread.start()
    try:
        yield address
    finally:
        server.close()
        thread.join(5)  # it must not outlive the test, and its clocks
