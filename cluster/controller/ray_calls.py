"""Calls of Ray actors that are awaited for so long and no longer."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import TypeVar

Answer = TypeVar("Answer")


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
