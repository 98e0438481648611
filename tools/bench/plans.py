"""Sending a plan to followers until all have said that they carried it out: processes of this machine, with a step that takes
no time. And how much of that a step hides when plans are sent ahead.

python -m tools.bench.plans
"""

from __future__ import annotations

import multiprocessing
import statistics
import time
import types
from typing import Any

from workers.host.follower import follow
from workers.host.streams import LeaderServer, connect, free_port
from workers.messages.frames import Hello
from workers.messages.plan import DecodeRow, Plan
from workers.runtime.profiler import Profiler

PLANS = 2000
STEP_SECONDS = 0.01


class _Instant:
    """A runtime without devices."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds

    def execute(self, plan: Plan) -> Any:
        if self._seconds:
            time.sleep(self._seconds)
        return types.SimpleNamespace(plan=plan)

    def wait(self, pending: Any) -> None:
        pass

    def probe(self) -> float:
        return 0.0


def _follow(address: str, rank: int, seconds: float) -> None:
    runtime: Any = _Instant(seconds)
    follow(runtime, connect(address, Hello(1, b"s", rank), 30), 1, Profiler())


def _lead(followers: int, seconds: float, plans: int, ahead: int) -> list[float]:
    """Seconds of each plan, from sending it until all are done; or, sent `ahead`, from one's end to the next one's."""
    address = f"127.0.0.1:{free_port('127.0.0.1')}"
    server = LeaderServer(address, 1, b"s", 1.5)
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=_follow, args=(address, rank, seconds)) for rank in range(1, followers + 1)]
    for process in processes:
        process.start()
    server.wait_for_followers(followers, 60)
    while len(server.done) < followers:
        time.sleep(0.01)
    times, last = [], 0.0
    for number in range(1, plans + 1):
        began = time.perf_counter()
        server.broadcast(Plan(number, (), (), tuple(DecodeRow(slot, number) for slot in range(16))))
        while min(server.done.values()) < number - ahead:
            time.sleep(0)
        now = time.perf_counter()
        times.append(now - (last if ahead and last else began))
        last = now
    server.close()
    for process in processes:
        process.join()
    return sorted(times[plans // 10 :])


def main() -> None:
    """Prints a line for each number of followers."""
    for followers in (2, 4, 8, 16):
        times = _lead(followers, 0.0, PLANS, 0)
        p50, p99 = times[len(times) // 2], times[len(times) * 99 // 100]
        print(f"{followers:>2} followers: p50 {p50 * 1e6:.0f} us, p99 {p99 * 1e6:.0f} us")
    for ahead in (0, 1):
        median = statistics.median(_lead(2, STEP_SECONDS, 200, ahead))
        print(f"steps of {STEP_SECONDS * 1000:.0f} ms, plans sent {ahead} ahead: {median * 1000:.2f} ms a step")


if __name__ == "__main__":
    main()
