"""What becomes of a call, whichever door it comes in by: its caller is known before its message is read, and in the end it is
counted, traced and logged in one line."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence

import grpc
from opentelemetry import trace

from cluster.gateway.auth.api_keys import Keys
from cluster.gateway.call import CURRENT, Call
from cluster.gateway.errors import KEY_LIMIT, GatewayError, code_name
from cluster.telemetry import metrics
from cluster.telemetry.traces import parent_of

_LOG = logging.getLogger(__name__)

#: Calls for keys with the scope `admin`.
_ADMIN = ("Profile", "Restart")
#: Calls that are logged at INFO; the others, which look on, at DEBUG, as are floods that are turned away, which metrics count.
_WORK = (*metrics.COMPLETING, *_ADMIN)
_TURNED_AWAY = ("RESOURCE_EXHAUSTED", "UNAUTHENTICATED", "PERMISSION_DENIED")

Metadata = Sequence[tuple[str, str | bytes]]


class Outcome:
    """Of one call: `begin` before it is answered, `end` afterwards."""

    def __init__(
        self, method: str, path: str, system: str, metadata: Metadata, keys: Keys, tracer: trace.Tracer
    ) -> None:
        """`metadata` are the call's headers, their names in lower case."""
        self.call = Call(method)
        self._system = system
        self._metadata = metadata
        self._keys = keys
        # Not the current span of a context: a stream that a client leaves is closed in another one than it began in.
        self.call.span = tracer.start_span(path, context=parent_of(metadata), kind=trace.SpanKind.SERVER)

    def begin(self) -> None:
        """Makes the call the current one. Raises GatewayError for callers without a key, or with one that does not allow the
        call."""
        CURRENT.set(self.call)
        try:
            self.call.caller = self._keys.caller(self._metadata)
        except GatewayError:
            metrics.REJECTIONS.labels("unauthenticated").inc()
            raise
        if self.call.method in _ADMIN and "admin" not in self.call.caller.scopes:
            metrics.REJECTIONS.labels("scope").inc()
            raise GatewayError(
                grpc.StatusCode.PERMISSION_DENIED, "SCOPE", f"{self.call.method} wants a key with the scope admin"
            )

    def end(self, error: BaseException | None, seconds_left: float | None) -> GatewayError | None:
        """Counts, traces and logs what the call ended with; the error that the client gets, if it still listens."""
        call = self.call
        code = code_name(error, seconds_left)
        seconds = time.monotonic() - call.began
        metrics.REQUESTS.labels(call.method, code).inc()
        own_limit = isinstance(error, GatewayError) and error.reason == KEY_LIMIT
        if code in metrics.FAILURE_CODES and call.method in metrics.COMPLETING and not own_limit:
            metrics.FAILURES.labels(code).inc()
        if code == "RESOURCE_EXHAUSTED":
            metrics.REJECTION_SECONDS.observe(seconds)
        level = logging.INFO if call.method in _WORK and code not in _TURNED_AWAY else logging.DEBUG
        fields = {**call.log_fields(), "method": call.method, "code": code, "seconds": round(seconds, 4)}
        _LOG.log(level, "%s %s in %.3f s", call.method, code, seconds, extra=fields)
        span = call.span
        span.set_attributes(
            {"rpc.system": self._system, "rpc.method": call.method, "rpc.response.status_code": code}
            | {f"grokmesh.{key}": value for key, value in call.log_fields().items() if value is not None}
        )
        if code not in ("OK", "CANCELLED"):
            span.set_status(trace.StatusCode.ERROR, str(error) if isinstance(error, GatewayError) else code)
        span.end()
        if isinstance(error, GatewayError):
            return error
        if code != "INTERNAL":
            return None
        _LOG.error("%s failed", call.method, exc_info=error, extra=call.log_fields())
        return GatewayError(grpc.StatusCode.INTERNAL, "INTERNAL", "an error within the gateway; see its log")
