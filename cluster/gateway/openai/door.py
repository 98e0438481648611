"""Between the HTTP server and the routes: the caller is known before a message is read; messages are read a few at a time, in
limits of bytes and time; a client that leaves ends its work; each call is counted, traced and logged."""

from __future__ import annotations

import asyncio
import collections
import contextlib
from collections.abc import MutableMapping
from typing import Any

from opentelemetry import trace
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cluster.gateway.auth.api_keys import Keys
from cluster.gateway.call import Call
from cluster.gateway.errors import GatewayError, malformed
from cluster.gateway.interceptor import RECEIVE_SECONDS, RECEIVING, RECEIVING_OF_A_KEY
from cluster.gateway.openai.errors import response_of
from cluster.gateway.outcome import Outcome

#: Paths that want no key: probes do not have one, and people give theirs to the page.
_OPEN = ("/health", "/")
#: Names of calls in logs and metrics; all others have one, so that strangers do not make more.
_NAMES = {
    "/v1/completions": "Completions",
    "/v1/chat/completions": "ChatCompletions",
    "/v1/responses": "ChatCompletions",
    "/tokenize": "Tokenize",
    "/detokenize": "Detokenize",
}
_OTHER = "Http"


def _headers(call: Call) -> list[tuple[bytes, bytes]]:
    """What an answer says of its call: its name, and the replica and the epoch that have begun to compute it."""
    named = {"x-request-id": call.request_id}
    if call.session is not None:
        named |= {"x-grokmesh-replica": str(call.session.replica), "x-grokmesh-epoch": str(call.session.epoch)}
    return [(name.encode(), value.encode()) for name, value in named.items()]


class Door:
    """An ASGI application around another."""

    def __init__(self, app: ASGIApp, keys: Keys, tracer: trace.Tracer, most_bytes: int) -> None:
        """`most_bytes` is the most that a message may have."""
        self._app = app
        self._keys = keys
        self._tracer = tracer
        self._most_bytes = most_bytes
        self._places = asyncio.Semaphore(RECEIVING)
        self._own: dict[str, asyncio.Semaphore] = collections.defaultdict(lambda: asyncio.Semaphore(RECEIVING_OF_A_KEY))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope["path"]
        if path in _OPEN:
            await self._app(scope, receive, send)
            return
        metadata = [(name.decode("latin-1"), value.decode("latin-1")) for name, value in scope["headers"]]
        outcome = Outcome(_NAMES.get(path, _OTHER), path[1:], "http", metadata, self._keys, self._tracer)
        begun = False

        async def named(message: Message) -> None:
            nonlocal begun
            if message["type"] == "http.response.start":
                begun = True
                message = {**message, "headers": [*message.get("headers", ()), *_headers(outcome.call)]}
            await send(message)

        error: BaseException | None = None
        try:
            outcome.begin()
            body = await self._receive(scope, receive, outcome.call.caller.name)
            await self._answer(scope, body, receive, named)
            error = outcome.call.failure
        except GatewayError as wrong:
            error = wrong
            await response_of(wrong)(scope, receive, named)
        except BaseException as raised:
            error = raised
            if not isinstance(raised, (Exception, asyncio.CancelledError)):
                raise
        finally:
            wrong_end = outcome.end(error, None)
            if wrong_end is not None and not begun:
                with contextlib.suppress(Exception):
                    await response_of(wrong_end)(scope, receive, named)

    async def _receive(self, scope: Scope, receive: Receive, caller: str) -> bytes:
        """A call's whole message. Raises GatewayError; CancelledError if the client has left."""
        length = next((value for name, value in scope["headers"] if name == b"content-length"), b"0")
        if int(length) > self._most_bytes:
            raise self._too_long(int(length))
        body = bytearray()
        try:
            async with asyncio.timeout(RECEIVE_SECONDS), self._own[caller], self._places:
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise asyncio.CancelledError
                    body += message.get("body", b"")
                    if len(body) > self._most_bytes:
                        raise self._too_long(len(body))
                    if not message.get("more_body"):
                        return bytes(body)
        except TimeoutError:
            raise malformed(f"the request has not arrived within {RECEIVE_SECONDS:g} s") from None

    def _too_long(self, size: int) -> GatewayError:
        return malformed(f"the request has {size} bytes; no valid one has more than {self._most_bytes}")

    async def _answer(self, scope: Scope, body: bytes, receive: Receive, send: Send) -> None:
        """Has the application answer while the client is there. Raises CancelledError when it has left."""
        messages: list[MutableMapping[str, Any]] = [{"type": "http.request", "body": body, "more_body": False}]

        async def again() -> Message:
            if messages:
                return messages.pop()
            await asyncio.Event().wait()
            raise AssertionError

        work = asyncio.ensure_future(self._app(scope, again, send))
        gone = asyncio.ensure_future(receive())
        try:
            await asyncio.wait((work, gone), return_when=asyncio.FIRST_COMPLETED)
        finally:
            gone.cancel()
            if not work.done():
                work.cancel()
            await asyncio.gather(work, gone, return_exceptions=True)
        await work
