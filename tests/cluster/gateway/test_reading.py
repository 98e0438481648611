"""Clients that leave their streams unread."""

from __future__ import annotations

import asyncio

import pytest

from cluster.gateway import service
from cluster.gateway.service import Reading


def test_a_stream_may_last_but_no_part_of_it_may_be_left_unread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service, "UNREAD_SECONDS", 0.2)
    sent = []

    async def send(seconds: list[float]) -> None:
        async with Reading() as reading:
            for taken in seconds:
                with reading:
                    await asyncio.sleep(taken)
                sent.append(taken)
                await asyncio.sleep(0.05)  # the next part is made

    asyncio.run(send([0.01] * 8))
    assert len(sent) == 8
    with pytest.raises(asyncio.CancelledError):
        asyncio.run(send([0.02, 10.0]))
    assert sent[8:] == [0.02]
