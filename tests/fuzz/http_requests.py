"""A connection of the HTTP interface, from raw bytes through parser, routes and validation to a service that does nothing."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from typing import Any

import uvicorn
from opentelemetry import trace
from uvicorn.server import ServerState

from cluster.gateway.auth.api_keys import ANONYMOUS, Keys
from cluster.gateway.errors import Violation, invalid
from cluster.gateway.openai.app import Served, make_app
from cluster.gateway.openai.chat_template import ChatTemplate
from cluster.gateway.openai.door import Door
from cluster.gateway.openai.server import _Protocol
from cluster.gateway.text_job import detokenize, tokenize
from cluster.gateway.validation import Limits, to_request
from grok.serving.v1 import generation_pb2
from tests.support.fake_service import MODEL, TOKENIZER, InlineTexts

_LIMITS = Limits(MODEL, 512, TOKENIZER.longest_piece)
_TEMPLATE = "{% for message in messages %}{{ message.content }}{% endfor %}{{ tools }}"


class _Service:
    """Answers what is right at once, with nothing, as GenerationService does."""

    def __init__(self) -> None:
        self._texts = InlineTexts()

    async def GenerateOnce(
        self, request: generation_pb2.GenerateOnceRequest, context: object
    ) -> generation_pb2.GenerateOnceResponse:
        completion = request.completion
        await to_request(completion, _LIMITS, self._texts, ANONYMOUS, "r", whole=True)
        answers = [
            generation_pb2.GenerateOnceResponse(finish_reason=generation_pb2.FINISH_REASON_EOS)
            for _ in range(max(completion.n, 1))
        ]
        answers[0].others.extend(answers[1:])
        return answers[0]

    async def Generate(
        self, request: generation_pb2.GenerateRequest, context: object
    ) -> AsyncIterator[generation_pb2.GenerateResponse]:
        completion = request.completion
        await to_request(completion, _LIMITS, self._texts, ANONYMOUS, "r", whole=False)
        for index in range(max(completion.n, 1)):
            usage = generation_pb2.Usage(prompt_tokens=1)
            reason = generation_pb2.FINISH_REASON_EOS
            yield generation_pb2.GenerateResponse(index=index, finish_reason=reason, usage=usage)

    async def Tokenize(self, request: Any, context: object) -> Any:
        if isinstance(request, bytes):
            return tokenize(generation_pb2.TokenizeRequest.FromString(request), TOKENIZER).SerializeToString()
        return tokenize(request, TOKENIZER)

    async def Detokenize(self, request: Any, context: object) -> Any:
        raw = isinstance(request, bytes)
        try:
            found = detokenize(
                generation_pb2.DetokenizeRequest.FromString(request) if raw else request, TOKENIZER, MODEL.vocab_size
            )
        except ValueError as error:
            raise invalid([Violation("ids", str(error))]) from error
        return found.SerializeToString() if raw else found

    async def Cancel(self, request: object, context: object) -> generation_pb2.CancelResponse:
        return generation_pb2.CancelResponse()

    async def GetLoad(self, request: object, context: object) -> generation_pb2.GetLoadResponse:
        return generation_pb2.GetLoadResponse()


class _Transport(asyncio.Transport):
    """Keeps what is written."""

    def __init__(self) -> None:
        super().__init__()
        self.written = bytearray()
        self._closing = False

    def write(self, data: Any) -> None:
        self.written += data

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return {"peername": ("127.0.0.1", 1), "sockname": ("127.0.0.1", 2)}.get(name, default)

    def is_closing(self) -> bool:
        return self._closing

    def close(self) -> None:
        self._closing = True

    def pause_reading(self) -> None: ...

    def resume_reading(self) -> None: ...


class Connections:
    """Gives the interface one connection after the other."""

    def __init__(self) -> None:
        self._runner = asyncio.Runner()
        service: Any = _Service()
        model = generation_pb2.GetModelResponse(name="demo", context_length=_LIMITS.context, eos_token=MODEL.eos_token)
        template = ChatTemplate(_TEMPLATE, "template", "")
        app = make_app(Served(service, TOKENIZER, template, model, "0", lambda: True))
        door = Door(app, Keys(None), trace.NoOpTracer(), 1 << 20)
        self._config = uvicorn.Config(door, http=_Protocol, ws="none", lifespan="off", log_config=None)

    def answers(self, data: bytes) -> bytes:
        """What is written to a client that sends this and leaves. Raises AssertionError if that takes long."""
        return self._runner.run(self._answers(data))

    async def _answers(self, data: bytes) -> bytes:
        transport, state = _Transport(), ServerState()
        protocol = _Protocol(config=self._config, server_state=state, app_state={})
        protocol.connection_made(transport)
        protocol.data_received(data)
        for _ in range(20):  # turns in which what is right is answered
            await asyncio.sleep(0)
        protocol.connection_lost(None)
        if state.tasks:
            _, late = await asyncio.wait(state.tasks, timeout=10)
            assert not late, "a request is still answered though its client has left"
        return bytes(transport.written)


def requests() -> Iterator[bytes]:
    """Requests that are right."""
    text: dict[str, Any] = {"model": "demo", "prompt": "In the beginning", "max_tokens": 4}
    chat: dict[str, Any] = {"model": "demo", "messages": [{"role": "user", "content": "Who?"}], "seed": 3}
    schema = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "integer"}}}
    tag = {"begin": "<f>", "schema": {"const": 1}, "end": "</f>"}
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
    for path, body in (
        ("/v1/completions", text | {"stream": True, "stream_options": {"include_usage": True}, "stop": ["a"], "n": 2}),
        ("/v1/completions", text | {"prompt": ["a", "b"], "echo": True, "logprobs": 2, "logit_bias": {"5": 1.5}}),
        ("/v1/completions", text | {"prompt": [5, 6], "structured_outputs": {"regex": "a+"}, "bad_words": ["x"]}),
        ("/v1/completions", text | {"structured_outputs": {"grammar": 'start: "a"'}, "top_k": 3, "best_of": 2}),
        ("/v1/chat/completions", chat | {"response_format": schema, "top_logprobs": 2, "logprobs": True}),
        ("/v1/chat/completions", chat | {"tools": [tool], "tool_choice": "required", "stream": True}),
        (
            "/v1/chat/completions",
            chat | {"response_format": {"type": "structural_tag", "structures": [tag], "triggers": ["<"]}},
        ),
        ("/v1/responses", {"model": "demo", "input": "Who?", "text": {"format": {"type": "json_object"}}}),
        ("/v1/responses", {"model": "demo", "input": [{"role": "user", "content": "Who?"}], "stream": True}),
        ("/tokenize", {"prompt": "In the beginning"}),
        ("/detokenize", {"tokens": [5, 6]}),
        ("/cancel", {"request_id": "r-1"}),
    ):
        content = json.dumps(body).encode()
        head = (
            f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(content)}\r\n"
        )
        yield head.encode() + b"\r\n" + content
    for path in ("/", "/health", "/version", "/load", "/tokenizer_info", "/v1/models", "/v1/models/demo"):
        yield f"GET {path} HTTP/1.1\r\nhost: x\r\nauthorization: Bearer x\r\nx-request-timeout: 3\r\n\r\n".encode()
