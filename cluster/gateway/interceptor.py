"""Around every call: malformed messages become INVALID_ARGUMENT, GatewayErrors a status with details, anything else
INTERNAL without its text; the caller's key is checked; each call is counted, traced and logged in one line."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
import grpc.aio
from google.protobuf.message import DecodeError
from opentelemetry import trace

from cluster.gateway.call import CURRENT, Call
from cluster.gateway.errors import GatewayError, code_name
from cluster.gateway.keys import ANONYMOUS, Keys
from cluster.telemetry import metrics
from cluster.telemetry.traces import parent_of

_LOG = logging.getLogger(__name__)
_OURS = "/grok.serving.v1."
#: Calls that are logged at INFO; the others, which look on, at DEBUG.
_WORK = ("Generate", "GenerateOnce", "Profile", "Restart")
#: Calls for keys with the scope `admin`.
_ADMIN = ("Profile", "Restart")


class _Malformed:
    """Stands for a message that is no protobuf of its type."""


class CallInterceptor(grpc.aio.ServerInterceptor):
    """Wraps the handlers of our own services; health and reflection are left alone, and open to all."""

    def __init__(self, keys: Keys | None, tracer: trace.Tracer) -> None:
        self._keys = keys
        self._tracer = tracer

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any] | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        """The wrapped handler."""
        handler = await continuation(handler_call_details)
        method = handler_call_details.method
        if handler is None or not method.startswith(_OURS):
            return handler
        parse = handler.request_deserializer
        assert parse is not None

        def deserialize(data: bytes) -> Any:
            try:
                return parse(data)
            except DecodeError:
                return _Malformed()

        def outcome(context: grpc.aio.ServicerContext[Any, Any]) -> _Outcome:
            return _Outcome(method, context, self._keys, self._tracer)

        if handler.response_streaming:
            return grpc.unary_stream_rpc_method_handler(
                _streamed(outcome, handler.unary_stream), deserialize, handler.response_serializer
            )
        return grpc.unary_unary_rpc_method_handler(
            _single(outcome, handler.unary_unary), deserialize, handler.response_serializer
        )


_MakeOutcome = Callable[["grpc.aio.ServicerContext[Any, Any]"], "_Outcome"]


def _single(make: _MakeOutcome, behaviour: Any) -> Any:
    async def call(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
        async with make(context) as outcome:
            outcome.check(request)
            return await behaviour(request, context)

    return call


def _streamed(make: _MakeOutcome, behaviour: Any) -> Any:
    async def call(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> AsyncIterator[Any]:
        async with make(context) as outcome:
            outcome.check(request)
            # Closed before the outcome is told, also when the client leaves while a response is being sent.
            async with contextlib.aclosing(behaviour(request, context)) as responses:
                async for response in responses:
                    yield response

    return call


class _Outcome:
    """Turns what a call raises into its status, and tells of it."""

    def __init__(
        self, method: str, context: grpc.aio.ServicerContext[Any, Any], keys: Keys | None, tracer: trace.Tracer
    ) -> None:
        self._context = context
        self._keys = keys
        self._call = Call(method.rsplit("/", 1)[1])
        self._metadata: Any = context.invocation_metadata() or ()
        # Not the current span of a context: a stream that a client leaves is closed in another one than it began in.
        self._call.span = tracer.start_span(method[1:], context=parent_of(self._metadata), kind=trace.SpanKind.SERVER)

    async def __aenter__(self) -> _Outcome:
        CURRENT.set(self._call)
        return self

    def check(self, request: Any) -> None:
        """Refuses callers without a key, and messages that are none."""
        try:
            self._call.caller = self._keys.caller(self._metadata) if self._keys else ANONYMOUS
        except GatewayError:
            metrics.REJECTIONS.labels("unauthenticated").inc()
            raise
        if self._call.method in _ADMIN and "admin" not in self._call.caller.scopes:
            metrics.REJECTIONS.labels("scope").inc()
            raise GatewayError(
                grpc.StatusCode.PERMISSION_DENIED, "SCOPE", f"{self._call.method} wants a key with the scope admin"
            )
        if isinstance(request, _Malformed):
            raise GatewayError(
                grpc.StatusCode.INVALID_ARGUMENT, "MALFORMED_MESSAGE", "the request is no protobuf of its type"
            )

    async def __aexit__(self, kind: Any, error: BaseException | None, trace_back: Any) -> None:
        call = self._call
        code = code_name(error, self._context.time_remaining())
        status = self._status(code, error)
        seconds = time.monotonic() - call.began
        metrics.REQUESTS.labels(call.method, code).inc()
        if code == "RESOURCE_EXHAUSTED":
            metrics.REJECTION_SECONDS.observe(seconds)
        # Of a flood that is turned away metrics tell.
        level = logging.INFO if call.method in _WORK and code != "RESOURCE_EXHAUSTED" else logging.DEBUG
        fields = {**call.log_fields(), "method": call.method, "code": code, "seconds": round(seconds, 4)}
        _LOG.log(level, "%s %s in %.3f s", call.method, code, seconds, extra=fields)
        span = call.span
        span.set_attributes(
            {"rpc.system": "grpc", "rpc.method": call.method, "rpc.response.status_code": code}
            | {f"grokmesh.{key}": value for key, value in call.log_fields().items() if value is not None}
        )
        if code not in ("OK", "CANCELLED"):
            span.set_status(trace.StatusCode.ERROR, str(error) if isinstance(error, GatewayError) else code)
        span.end()
        if status is not None:
            await self._context.abort_with_status(status)

    def _status(self, code: str, error: BaseException | None) -> grpc.Status | None:
        """What the client is told, if it still listens."""
        if isinstance(error, GatewayError):
            return error.status()
        if code != "INTERNAL":
            return None
        _LOG.error("%s failed", self._call.method, exc_info=error, extra=self._call.log_fields())
        return GatewayError(grpc.StatusCode.INTERNAL, "INTERNAL", "an error within the gateway; see its log").status()
