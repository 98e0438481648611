"""The routes of the HTTP interface."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import msgspec
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, StreamingResponse
from google.protobuf import json_format
from starlette.exceptions import HTTPException

from cluster.gateway.call import CURRENT
from cluster.gateway.errors import GatewayError, Violation, invalid
from cluster.gateway.openai.chat import ChatCompletions
from cluster.gateway.openai.chat_template import ChatTemplate
from cluster.gateway.openai.completions import TextCompletions
from cluster.gateway.openai.errors import body_of, field_name, no_model, response_of
from cluster.gateway.openai.playground import Playground
from cluster.gateway.openai.responses import Responses
from cluster.gateway.openai.schema import (
    CancelRequest,
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    ResponsesRequest,
    TokenizeRequest,
)
from cluster.gateway.openai.sessions import Deadline, Sessions
from cluster.gateway.service import GenerationService
from cluster.gateway.texts import INLINE_BYTES
from grok.serving.v1 import generation_pb2
from workers.text.tokenizer import Tokenizer

#: Of a call, in seconds; see `Deadline`.
TIMEOUT_HEADER = "x-request-timeout"


@dataclasses.dataclass(frozen=True)
class Served:
    """What the routes answer with.

    Attributes:
      service: that completes.
      tokenizer: of the model.
      template: of chats, if the model has one.
      model: that is served.
      version: of Grokmesh.
      ready: whether a replica is in reach.
    """

    service: GenerationService
    tokenizer: Tokenizer
    template: ChatTemplate | None
    model: generation_pb2.GetModelResponse
    version: str
    ready: Callable[[], bool]


def make_app(served: Served) -> FastAPI:
    """The application. It takes callers to be known; see `Door`."""
    app = FastAPI(title="Grokmesh", version=served.version, docs_url=None, redoc_url=None)
    began = int(time.time())

    def about_model() -> dict[str, Any]:
        return {
            "id": served.model.name,
            "object": "model",
            "created": began,
            "owned_by": "grokmesh",
            "max_model_len": served.model.context_length,
        }

    def check_model(asked: str | None) -> None:
        if asked not in (None, served.model.name):
            raise no_model(asked or "", served.model.name)

    async def answer(
        made: TextCompletions | ChatCompletions | Responses, request: Request, *, stream: bool | None
    ) -> Response:
        sessions = Sessions(served.service, Deadline(_seconds(request)))
        if not stream:
            return JSONResponse(await made.whole(sessions))
        chunks = made.chunks(sessions)
        # What is wrong before anything has been sent is an answer of its own.
        first = await anext(chunks)
        return StreamingResponse(_events(first, chunks), media_type="text/event-stream")

    def head(prefix: str) -> dict[str, Any]:
        return {"id": f"{prefix}-{CURRENT.get().request_id}", "created": int(time.time()), "model": served.model.name}

    page = Playground.read()

    @app.get("/", include_in_schema=False)
    async def playground() -> Response:
        """A page to try the model with."""
        return HTMLResponse(page.text, headers={"content-security-policy": page.policy})

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        """The one model that is served."""
        return {"object": "list", "data": [about_model()]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        """The model of a name."""
        check_model(name)
        return about_model()

    @app.post("/v1/completions")
    async def completions(body: CompletionRequest, request: Request) -> Response:
        """Goes on with one text or several."""
        check_model(body.model)
        return await answer(TextCompletions(body, served.tokenizer, head("cmpl")), request, stream=body.stream)

    @app.post("/v1/chat/completions")
    async def chat(body: ChatRequest, request: Request) -> Response:
        """Answers in a chat, if the model has a chat template."""
        check_model(body.model)
        made = ChatCompletions(body, served.template, served.tokenizer, head("chatcmpl"))
        return await answer(made, request, stream=body.stream)

    @app.post("/v1/responses")
    async def responses(body: ResponsesRequest, request: Request) -> Response:
        """Answers in a chat, in the form of OpenAI's newer interface."""
        check_model(body.model)
        made = Responses(body, served.template, served.tokenizer, head("resp"))
        return await answer(made, request, stream=body.stream)

    @app.post("/tokenize")
    async def tokenize(body: TokenizeRequest) -> dict[str, Any]:
        """The tokens of a text."""
        check_model(body.model)
        found = await _texts(
            "Tokenize", generation_pb2.TokenizeRequest(text=body.prompt), generation_pb2.TokenizeResponse
        )
        return {"count": len(found.ids), "max_model_len": served.model.context_length, "tokens": list(found.ids)}

    @app.post("/detokenize")
    async def detokenize(body: DetokenizeRequest) -> dict[str, Any]:
        """The text of tokens."""
        check_model(body.model)
        asked = generation_pb2.DetokenizeRequest(ids=body.tokens)
        found = await _texts("Detokenize", asked, generation_pb2.DetokenizeResponse)
        return {"prompt": found.text}

    async def _asked(method: str, message: Any) -> Any:
        return await getattr(served.service, method)(message, Deadline(None))

    async def _texts(method: str, asked: Any, kind: Any) -> Any:
        """An answer of the service about texts: large requests travel as bytes, and so do their answers."""
        found = await _asked(method, asked.SerializeToString() if asked.ByteSize() > INLINE_BYTES else asked)
        return kind.FromString(found) if isinstance(found, bytes) else found

    @app.post("/cancel")
    async def cancel(body: CancelRequest) -> dict[str, Any]:
        """Ends a completion, wherever it runs: its own call ends with an error."""
        await _asked("Cancel", generation_pb2.CancelRequest(request_id=body.request_id))
        return {}

    @app.get("/load")
    async def load() -> dict[str, Any]:
        """How busy the replicas are."""
        found = await _asked("GetLoad", generation_pb2.GetLoadRequest())
        return json_format.MessageToDict(
            found, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
        )

    @app.get("/tokenizer_info")
    async def tokenizer_info() -> dict[str, Any]:
        """What a harness wants to know of the tokenizer: the pieces of its control tokens, and the chat template."""
        return {
            "tokenizer_class": "SentencePiece",
            **served.tokenizer.control_pieces(served.model.eos_token),
            "model_max_length": served.model.context_length,
            "chat_template": served.template.source if served.template else None,
        }

    @app.get("/health")
    async def health() -> Response:
        """Whether a replica is in reach: 200 or 503."""
        return Response(status_code=200 if served.ready() else 503)

    @app.get("/version")
    async def version() -> dict[str, str]:
        return {"version": served.version}

    @app.exception_handler(GatewayError)
    async def told(_: Request, error: GatewayError) -> Response:
        CURRENT.get().failure = error
        return response_of(error)

    @app.exception_handler(RequestValidationError)
    async def malformed(request: Request, error: RequestValidationError) -> Response:
        return await told(request, invalid(_violations(error)))

    @app.exception_handler(HTTPException)
    async def unknown(_: Request, error: HTTPException) -> Response:
        text = {404: "there is no such path", 405: "this path wants another method"}.get(
            error.status_code, error.detail
        )
        body = {"message": text, "type": "invalid_request_error", "param": None, "code": None}
        return JSONResponse({"error": body}, error.status_code, error.headers)

    return app


async def _events(first: dict[str, Any], chunks: AsyncIterator[dict[str, Any]]) -> AsyncIterator[bytes]:
    """Server-sent events, the last of them [DONE]; what goes wrong on the way is one, too."""
    try:
        yield _event(first)
        async for chunk in chunks:
            yield _event(chunk)
        yield b"data: [DONE]\n\n"
    except GatewayError as error:
        CURRENT.get().failure = error
        yield _event(body_of(error))
    finally:
        await chunks.aclose()  # type: ignore[attr-defined]


def _event(body: dict[str, Any]) -> bytes:
    """An event, with its type for `EventSource` where it has one."""
    named = b"event: %s\n" % body["type"].encode() if "type" in body else b""
    return named + b"data: " + msgspec.json.encode(body) + b"\n\n"


def _seconds(request: Request) -> float | None:
    """How long the client waits. Raises GatewayError."""
    given = request.headers.get(TIMEOUT_HEADER)
    if given is None:
        return None
    try:
        seconds = float(given)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < float("inf"):
        raise invalid([Violation(TIMEOUT_HEADER, f"is {given!r}; must be a number of seconds")])
    return seconds


def _violations(error: RequestValidationError) -> list[Violation]:
    """What pydantic has found, a field once: of a value that may be of several kinds it names each."""
    found: dict[str, Violation] = {}
    for problem in error.errors():
        if problem["type"] == "json_invalid":
            return [Violation("body", f"is no JSON: {problem['ctx']['error']}")]
        field = field_name(problem["loc"]) or "body"
        text = "is unknown here, or not supported" if problem["type"] == "extra_forbidden" else problem["msg"]
        found.setdefault(field.split(".")[0], Violation(field, text[:1].lower() + text[1:]))
    return list(found.values())
