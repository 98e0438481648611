"""How many completions may be in the gateway at once."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from cluster.gateway.errors import exhausted, unavailable
from cluster.telemetry import metrics


class Admission:
    """Admits up to a fixed number of completions, and none once draining. The answer is always immediate."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self.in_flight = 0
        self.draining = False

    @contextlib.contextmanager
    def admitted(self) -> Iterator[None]:
        """Holds a place while the block runs. Raises GatewayError: RESOURCE_EXHAUSTED, or UNAVAILABLE when draining."""
        if self.draining:
            metrics.REJECTIONS.labels("draining").inc()
            raise unavailable("the gateway is shutting down")
        if self.in_flight >= self._limit:
            metrics.REJECTIONS.labels("full").inc()
            raise exhausted(f"{self.in_flight} requests are in the gateway already", retry_seconds=1.0)
        self.in_flight += 1
        metrics.IN_FLIGHT.set(self.in_flight)
        try:
            yield
        finally:
            self.in_flight -= 1
            metrics.IN_FLIGHT.set(self.in_flight)
