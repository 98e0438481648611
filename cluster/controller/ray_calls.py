"""Calls of Ray that hold up no loop: those of actors are awaited for so long and no longer, and nobody waits for a kill."""

from __future__ import annotations

import asyncio
import concurrent.futures
from collections.abc import Awaitable
from typing import Any, TypeVar

import ray

Answer = TypeVar("Answer")

#: Where kills are waited for: Ray answers one of an actor whose node is gone only when it knows of that.
_KILLERS = concurrent.futures.ThreadPoolExecutor(16, "kill")
_kills: set[concurrent.futures.Future[None]] = set()


def kill(actor: Any) -> None:
    """Has an actor killed."""
    killing = _KILLERS.submit(ray.kill, actor)
    _kills.add(killing)
    killing.add_done_callback(_kills.discard)


async def killed(seconds: float) -> None:
    """Returns when all are dead that were to be killed, at most after `seconds`."""
    await asyncio.to_thread(concurrent.futures.wait, set(_kills), seconds)


async def answer(result: Awaitable[Answer], seconds: float, peer: str) -> Answer:
    """Awaits a Ray call. Raises TimeoutError, which names the peer, after `seconds`, and whatever the call raises."""
    call = asyncio.ensure_future(result)
    try:
        await asyncio.wait([call], timeout=seconds)
        if not call.done():
            await asyncio.sleep(0)  # if this loop itself stood still, the answer is there by now
        if not call.done():
            raise TimeoutError(f"{peer} has not answered for {seconds:g} s")
        return call.result()
    finally:
        call.cancel()
