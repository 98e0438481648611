"""Around every call: the caller is known before a message is read; messages are read a few at a time, in limits of bytes and
time; malformed ones become INVALID_ARGUMENT, GatewayErrors a status with details, anything else INTERNAL without its text."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import inspect
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
import grpc.aio
from google.protobuf.message import DecodeError
from opentelemetry import trace

from cluster.gateway.auth.api_keys import Keys
from cluster.gateway.call import CURRENT
from cluster.gateway.errors import GatewayError, exhausted, malformed
from cluster.gateway.outcome import Outcome
from cluster.gateway.scoring import MAX_CONTINUATIONS
from cluster.gateway.texts import INLINE_BYTES

_OURS = "/grok.serving.v1."
#: Calls whose messages are handed on as bytes if they are large: another process reads them.
_TEXTS = ("Tokenize", "Detokenize", "CountTokens")
#: Most bytes of a message of all calls but those, and completions.
_SMALL_BYTES = 64 * 1024
#: Messages that are being received at a time: of all keys, of one, of services that want none; seconds until one must be there.
RECEIVING, RECEIVING_OF_A_KEY, RECEIVING_OPEN, RECEIVE_SECONDS = 64, 16, 32, 10.0
#: Streams of services that want no key which may be open, and seconds that all but health's may last.
MOST_OPEN, OPEN_SECONDS = 256, 60.0
_WATCH = "/grpc.health.v1.Health/Watch"

_Context = "grpc.aio.ServicerContext[Any, Any]"
_Messages = AsyncIterator[bytes]


class CallInterceptor(grpc.aio.ServerInterceptor):
    """Wraps all handlers. Those of health and reflection are open to all, so there are only so many of them at a time.

    Every call is handled as one whose client streams: then it is the handler that reads its message, when it wants to.
    """

    def __init__(self, keys: Keys, tracer: trace.Tracer, completion_bytes: int) -> None:
        """`completion_bytes` is the most that a request for a completion may have."""
        self._keys = keys
        self._tracer = tracer
        scoring_bytes = (1 + MAX_CONTINUATIONS) * completion_bytes
        self._most_bytes = {
            "Generate": completion_bytes, "GenerateOnce": completion_bytes,
            "Score": scoring_bytes, "ScoreStream": scoring_bytes,
        }  # fmt: skip
        self._places = asyncio.Semaphore(RECEIVING)
        self._own: dict[str, asyncio.Semaphore] = collections.defaultdict(lambda: asyncio.Semaphore(RECEIVING_OF_A_KEY))
        self._open_places = asyncio.Semaphore(RECEIVING_OPEN)
        self._open = 0

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any] | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        handler = await continuation(handler_call_details)
        if handler is None:
            return None
        method = handler_call_details.method
        call = self._ours(method, handler) if method.startswith(_OURS) else self._strangers(method, handler)
        serialize = handler.response_serializer
        assert serialize is not None

        def serialized(response: Any) -> bytes:
            return response if isinstance(response, bytes) else serialize(response)

        if handler.response_streaming:
            return grpc.stream_stream_rpc_method_handler(call, None, serialized)
        return grpc.stream_unary_rpc_method_handler(call, None, serialized)

    def _ours(self, method: str, handler: Any) -> Any:
        name = method.rsplit("/", 1)[1]

        def parse(data: bytes) -> Any:
            if name in _TEXTS:
                return data if len(data) > INLINE_BYTES else handler.request_deserializer(data)
            most = self._most_bytes.get(name, _SMALL_BYTES)
            if len(data) > most:
                raise malformed(f"the request has {len(data)} bytes; no valid one has more than {most}")
            return handler.request_deserializer(data)

        def begin(context: Any) -> _Answered:
            metadata = context.invocation_metadata() or ()
            return _Answered(Outcome(name, method[1:], "grpc", metadata, self._keys, self._tracer), context)

        async def single(_: _Messages, context: Any) -> Any:
            async with begin(context):
                own = self._own[CURRENT.get().caller.name]
                return await handler.unary_unary(await _receive(context, parse, own, self._places), context)

        async def streamed(_: _Messages, context: Any) -> AsyncIterator[Any]:
            async with begin(context):
                own = self._own[CURRENT.get().caller.name]
                request = await _receive(context, parse, own, self._places)
                # Closed before the outcome is sent, also when the client leaves while a response is being sent.
                async with contextlib.aclosing(handler.unary_stream(request, context)) as responses:
                    async for response in responses:
                        yield response

        return streamed if handler.response_streaming else single

    def _strangers(self, method: str, handler: Any) -> Any:
        """Calls of services that want no key."""

        def parse(data: bytes) -> Any:
            if len(data) > _SMALL_BYTES:
                raise malformed(f"the request has {len(data)} bytes")
            return handler.request_deserializer(data)

        async def parsed(messages: _Messages) -> AsyncIterator[Any]:
            async for data in messages:
                yield parse(data)

        async def single(_: _Messages, context: Any) -> Any:
            async with self._told(context):
                return await handler.unary_unary(await _receive(context, parse, self._open_places), context)

        async def streamed(messages: _Messages, context: Any) -> AsyncIterator[Any]:
            async with (
                self._told(context),
                self._counted(),
                asyncio.timeout(None if method == _WATCH else OPEN_SECONDS),
            ):
                if handler.request_streaming:
                    responses = handler.stream_stream(parsed(messages), context)
                else:
                    responses = handler.unary_stream(await _receive(context, parse, self._open_places), context)
                if inspect.isawaitable(responses):  # it writes to the context itself
                    await responses
                    return
                async with contextlib.aclosing(responses):
                    async for response in responses:
                        yield response

        return streamed if handler.response_streaming else single

    @contextlib.asynccontextmanager
    async def _counted(self) -> AsyncIterator[None]:
        if self._open >= MOST_OPEN:
            raise exhausted("too many such calls are open", retry_seconds=10.0)
        self._open += 1
        try:
            yield
        finally:
            self._open -= 1

    @contextlib.asynccontextmanager
    async def _told(self, context: Any) -> AsyncIterator[None]:
        """Turns what goes wrong into a status."""
        try:
            yield
        except TimeoutError:
            await context.abort(grpc.StatusCode.DEADLINE_EXCEEDED, f"a call may last {OPEN_SECONDS:g} s; call again")
        except (GatewayError, DecodeError) as error:
            wrong = error if isinstance(error, GatewayError) else malformed("the request is no protobuf of its type")
            await context.abort_with_status(wrong.status())


async def _receive(context: Any, parse: Callable[[bytes], Any], *places: asyncio.Semaphore) -> Any:
    """The one message of a call, received when there is a place of all these kinds. Raises GatewayError for one that is none,
    or does not come."""
    try:
        async with asyncio.timeout(RECEIVE_SECONDS), contextlib.AsyncExitStack() as stack:
            for place in places:
                await stack.enter_async_context(place)
            data = await context.read()
        if data is grpc.aio.EOF:
            raise malformed("the call has no message")
        return parse(data)
    except TimeoutError:
        raise malformed(f"the request has not arrived within {RECEIVE_SECONDS:g} s") from None
    except DecodeError:
        raise malformed("the request is no protobuf of its type") from None


class _Answered:
    """Ends a call with the status that its outcome is."""

    def __init__(self, outcome: Outcome, context: Any) -> None:
        self._outcome, self._context = outcome, context

    async def __aenter__(self) -> None:
        try:
            self._outcome.begin()
        except GatewayError as error:
            await self.__aexit__(type(error), error, None)

    async def __aexit__(self, kind: Any, error: BaseException | None, trace_back: Any) -> None:
        wrong = self._outcome.end(error, self._context.time_remaining())
        if wrong is not None:
            await self._context.abort_with_status(wrong.status())
