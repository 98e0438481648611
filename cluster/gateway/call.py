"""What is known of the call that the current task answers: its line in the log, its span, its counts."""

from __future__ import annotations

import contextvars
import dataclasses
import secrets
import time
from typing import Any, Protocol

from opentelemetry import trace

from cluster.gateway.auth.api_keys import ANONYMOUS, Caller


class Placed(Protocol):
    """What is on a replica, in an epoch."""

    replica: int
    epoch: int


@dataclasses.dataclass
class Call:
    """One call.

    Attributes:
      method: name of the method.
      request_id: names it everywhere.
      caller: whose API key it brings.
      span: of its trace.
      session: that computes it, or one of several.
      details: more for its line in the log.
      failure: what its client was told instead of an answer, or within one.
    """

    method: str
    request_id: str = dataclasses.field(default_factory=lambda: f"r-{secrets.token_hex(8)}")
    caller: Caller = ANONYMOUS
    span: trace.Span = trace.INVALID_SPAN
    session: Placed | None = None
    began: float = dataclasses.field(default_factory=time.monotonic)
    details: dict[str, Any] = dataclasses.field(default_factory=dict)
    failure: Exception | None = None

    def log_fields(self) -> dict[str, Any]:
        """For a log line's `extra`."""
        return {
            "request_id": self.request_id, "key": self.caller.name,
            "replica": self.session and self.session.replica, "epoch": self.session and self.session.epoch,
            **self.details,
        }  # fmt: skip


#: The call of the current task.
CURRENT: contextvars.ContextVar[Call] = contextvars.ContextVar("call")


def begin_part(index: int) -> None:
    """The current task computes one of several parts of the call. Each but the first has a name of its own."""
    if index:
        call = CURRENT.get()
        CURRENT.set(dataclasses.replace(call, request_id=f"{call.request_id}.{index}", details={}))
