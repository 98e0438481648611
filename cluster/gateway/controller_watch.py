"""A gateway's view of the service, as the controller last reported it. Without a controller the last one goes on to count."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable

from cluster.controller.controller import ControllerClient
from cluster.controller.view import GatewayReport, ServiceView

_LOG = logging.getLogger(__name__)

#: Seconds between reports, with and without keys, whose limits hold over all gateways; and until a controller that does not
#: answer is asked again.
KEYS_SECONDS, SYNC_SECONDS, RETRY_SECONDS = 0.25, 1.0, 0.5
#: Seconds that a status waits for news.
REFRESH_SECONDS = 1.0


class ControllerWatch:
    """Reports to the controller, and passes on its views."""

    def __init__(
        self,
        controller: ControllerClient,
        report: Callable[[], GatewayReport],
        on_view: Callable[[ServiceView, GatewayReport], None],
        seconds: float = KEYS_SECONDS,
    ) -> None:
        """`on_view` gets each view, with the report that it answers. There is one at least every so many seconds."""
        self.view = ServiceView()
        self._controller = controller
        self._report = report
        self._seconds = seconds
        self._on_view = on_view

    async def run(self) -> None:
        """Until cancelled."""
        there = True
        while True:
            try:
                await self._sync(self._seconds)
                there = True
            except Exception as error:  # whatever is wrong with it, requests go on
                if there:
                    _LOG.warning("the controller does not answer: %s", error)
                there = False
                await asyncio.sleep(RETRY_SECONDS)

    async def refresh(self) -> None:
        """Asks for the view of this moment, if the controller answers soon."""
        with contextlib.suppress(Exception):
            async with asyncio.timeout(REFRESH_SECONDS):
                await self._sync(0.0)

    async def _sync(self, seconds: float) -> None:
        report = self._report()
        view = await self._controller.sync(report, self.view.version, seconds)
        (life, number), (known, last) = view.version, self.view.version
        if life != known or number >= last:  # else an answer that was overtaken
            self.view = view
            self._on_view(view, report)
