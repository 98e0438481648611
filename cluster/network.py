"""The network, as the control plane uses it: what a simulation plays."""

from __future__ import annotations

import asyncio
from typing import Protocol

from workers.host import liveness


class Network(Protocol):
    """How others are reached."""

    async def connect(self, host: str, port: int) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Opens a TCP stream. Raises OSError."""

    async def why_lost(self, address: str, silent: float, confirm: float = liveness.CONFIRM_SECONDS) -> str | None:
        """See `liveness.why_lost`."""


class RealNetwork:
    """This machine's."""

    async def connect(self, host: str, port: int) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await asyncio.open_connection(host, port)

    async def why_lost(self, address: str, silent: float, confirm: float = liveness.CONFIRM_SECONDS) -> str | None:
        return await asyncio.to_thread(liveness.why_lost, address, silent, confirm)


REAL: Network = RealNetwork()
