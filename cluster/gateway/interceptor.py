"""Around every call: malformed messages become INVALID_ARGUMENT, GatewayErrors a status with details, anything else
INTERNAL without its text; each call is counted and logged."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
import grpc.aio
from google.protobuf.message import DecodeError

from cluster.gateway.errors import GatewayError
from cluster.telemetry import metrics

_LOG = logging.getLogger(__name__)
_OURS = "/grok.serving.v1."


class _Malformed:
    """Stands for a message that is no protobuf of its type."""


class ErrorInterceptor(grpc.aio.ServerInterceptor):
    """Wraps the handlers of our own services; health and reflection are left alone."""

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

        name = method.rsplit("/", 1)[1]
        if handler.response_streaming:
            return grpc.unary_stream_rpc_method_handler(
                _streamed(name, handler.unary_stream), deserialize, handler.response_serializer
            )
        return grpc.unary_unary_rpc_method_handler(
            _single(name, handler.unary_unary), deserialize, handler.response_serializer
        )


def _single(name: str, behaviour: Any) -> Any:
    async def call(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
        async with _Outcome(name, context) as outcome:
            outcome.check(request)
            return await behaviour(request, context)

    return call


def _streamed(name: str, behaviour: Any) -> Any:
    async def call(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> AsyncIterator[Any]:
        async with _Outcome(name, context) as outcome:
            outcome.check(request)
            async for response in behaviour(request, context):
                yield response

    return call


class _Outcome:
    """Turns what a call raises into its status, and counts it."""

    def __init__(self, name: str, context: grpc.aio.ServicerContext[Any, Any]) -> None:
        self._name = name
        self._context = context
        self._began = time.monotonic()

    async def __aenter__(self) -> _Outcome:
        return self

    def check(self, request: Any) -> None:
        if isinstance(request, _Malformed):
            raise GatewayError(
                grpc.StatusCode.INVALID_ARGUMENT, "MALFORMED_MESSAGE", "the request is no protobuf of its type"
            )

    async def __aexit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        status = self._status(error)
        code = status.code.name if status else "CANCELLED" if error else "OK"
        metrics.REQUESTS.labels(self._name, code).inc()
        _LOG.info("%s %s in %.3f s", self._name, code, time.monotonic() - self._began)
        if status is not None:
            await self._context.abort_with_status(status)

    def _status(self, error: BaseException | None) -> grpc.Status | None:
        if isinstance(error, GatewayError):
            return error.status()
        if error is None or isinstance(error, (asyncio.CancelledError, GeneratorExit, grpc.aio.AbortError)):
            return None
        _LOG.error("%s failed", self._name, exc_info=error)
        return GatewayError(grpc.StatusCode.INTERNAL, "INTERNAL", "an error within the gateway; see its log").status()
