"""`/v1/responses`: a chat in the form of OpenAI's newer interface. Nothing is kept: each request brings the whole chat."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from typing import Any, Literal

from cluster.gateway.openai.chat import ChatCompletions
from cluster.gateway.openai.chat_template import ChatTemplate
from cluster.gateway.openai.schema import (
    ChatRequest,
    Function,
    FunctionCall,
    InputCall,
    InputCallOutput,
    InputMessage,
    JsonObjectFormat,
    JsonSchemaFormat,
    Message,
    NamedFunction,
    NamedTool,
    ResponseJsonSchema,
    ResponseNamedTool,
    ResponsesRequest,
    StreamOptions,
    TextFormat,
    TextPart,
    Tool,
    ToolCall,
)
from cluster.gateway.openai.sessions import Sessions
from workers.text.tokenizer import Tokenizer

#: Numbers that both interfaces have by the same names, and others that mean nothing to the model.
_SAME = ("temperature", "top_p", "seed", "user", "metadata", "store", "parallel_tool_calls")


class Responses:
    """The answer to one request."""

    def __init__(
        self, request: ResponsesRequest, template: ChatTemplate | None, tokenizer: Tokenizer, head: dict[str, Any]
    ) -> None:
        """`head` names the answer. Raises GatewayError."""
        self._chat = ChatCompletions(_chat(request), template, tokenizer, head)
        self._name = head["id"]
        self._about = {
            "id": head["id"], "object": "response", "created_at": head["created"], "model": head["model"],
            "instructions": request.instructions, "max_output_tokens": request.max_output_tokens,
            "temperature": request.temperature, "top_p": request.top_p, "metadata": request.metadata or {},
            "parallel_tool_calls": bool(request.parallel_tool_calls),
            "tools": [tool.model_dump() for tool in request.tools or ()],
            "tool_choice": request.model_dump()["tool_choice"] or "auto",
            "error": None, "incomplete_details": None, "output": [], "usage": None,
        }  # fmt: skip

    async def whole(self, sessions: Sessions) -> dict[str, Any]:
        answer = await self._chat.whole(sessions)
        (choice,) = answer["choices"]
        message = choice["message"]
        items = self._items(message["content"], message.get("tool_calls", ()))
        return self._ended(items, choice["finish_reason"], answer["usage"])

    async def chunks(self, sessions: Sessions) -> AsyncIterator[dict[str, Any]]:
        """The events of a stream. Where tools may be called, an answer comes at once, when it is known what it is."""
        events = _Numbered()
        begun = {**self._about, "status": "in_progress"}
        text, calls, finish, usage = "", list[dict[str, Any]](), "stop", dict[str, Any]()
        async for chunk in self._chat.chunks(sessions):
            if not events.sent:
                yield events.made("response.created", response=begun)
                yield events.made("response.in_progress", response=begun)
            usage = chunk["usage"] or usage
            for choice in chunk["choices"]:
                finish = choice["finish_reason"] or finish
                calls += choice["delta"].get("tool_calls", ())
                if delta := choice["delta"].get("content"):
                    if not text:
                        for event in self._text_begins(events):
                            yield event
                    text += delta
                    place = {"item_id": f"{self._name}-0", "output_index": 0, "content_index": 0}
                    yield events.made("response.output_text.delta", **place, delta=delta, logprobs=[])
        if not text and not calls:
            for event in self._text_begins(events):
                yield event
        items = self._items(None if calls else text, calls)
        for event in self._items_end(events, items):
            yield event
        ended = self._ended(items, finish, usage)
        yield events.made(f"response.{ended['status']}", response=ended)

    def _text_begins(self, events: _Numbered) -> Iterator[dict[str, Any]]:
        item = {**self._message(""), "status": "in_progress", "content": []}
        yield events.made("response.output_item.added", output_index=0, item=item)
        place = {"item_id": item["id"], "output_index": 0, "content_index": 0}
        yield events.made("response.content_part.added", **place, part=_part(""))

    def _items_end(self, events: _Numbered, items: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        for index, item in enumerate(items):
            place = {"item_id": item["id"], "output_index": index}
            if item["type"] == "message":
                (part,) = item["content"]
                yield events.made("response.output_text.done", **place, content_index=0, text=part["text"], logprobs=[])
                yield events.made("response.content_part.done", **place, content_index=0, part=part)
            else:
                begun = {**item, "arguments": "", "status": "in_progress"}
                yield events.made("response.output_item.added", output_index=index, item=begun)
                arguments = {"arguments": item["arguments"], "name": item["name"]}
                yield events.made("response.function_call_arguments.done", **place, **arguments)
            yield events.made("response.output_item.done", output_index=index, item=item)

    def _items(self, text: str | None, calls: Any) -> list[dict[str, Any]]:
        if text is not None:
            return [self._message(text)]
        return [
            {"type": "function_call", "id": f"{self._name}-{i}", "call_id": call["id"], "status": "completed"}
            | {name: call["function"][name] for name in ("name", "arguments")}
            for i, call in enumerate(calls)
        ]

    def _message(self, text: str) -> dict[str, Any]:
        message = {"type": "message", "id": f"{self._name}-0", "role": "assistant", "status": "completed"}
        return {**message, "content": [_part(text)]}

    def _ended(self, items: list[dict[str, Any]], finish: str, usage: dict[str, Any]) -> dict[str, Any]:
        whole = finish != "length"
        return {
            **self._about,
            "status": "completed" if whole else "incomplete",
            "incomplete_details": None if whole else {"reason": "max_output_tokens"},
            "output": items,
            "usage": {
                "input_tokens": usage["prompt_tokens"],
                "input_tokens_details": {
                    "cached_tokens": usage["prompt_tokens_details"]["cached_tokens"],
                    "cache_write_tokens": 0,
                },
                "output_tokens": usage["completion_tokens"],
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": usage["total_tokens"],
            },
        }


class _Numbered:
    """Events, each with its number."""

    def __init__(self) -> None:
        self.sent = 0

    def made(self, kind: str, **fields: Any) -> dict[str, Any]:
        event = {"type": kind, "sequence_number": self.sent, **fields}
        self.sent += 1
        return event


def _part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def _chat(request: ResponsesRequest) -> ChatRequest:
    """The chat that a request is."""
    messages = [Message(role="system", content=request.instructions)] if request.instructions else []
    items = [InputMessage(role="user", content=request.input)] if isinstance(request.input, str) else request.input
    messages += map(_said, items)
    tools = [
        Tool(type="function", function=Function(**tool.model_dump(exclude={"type"}))) for tool in request.tools or ()
    ]
    return ChatRequest(
        model=request.model,
        messages=messages,
        max_completion_tokens=request.max_output_tokens,
        stream_options=StreamOptions(include_usage=True),
        response_format=_format(request),
        tools=tools or None,
        tool_choice=_choice(request),
        **{name: getattr(request, name) for name in _SAME},
    )


def _format(request: ResponsesRequest) -> TextFormat | JsonObjectFormat | JsonSchemaFormat | None:
    wanted = None if request.text is None else request.text.format
    if isinstance(wanted, ResponseJsonSchema):
        return JsonSchemaFormat(type="json_schema", json_schema=wanted)
    return wanted


def _choice(request: ResponsesRequest) -> Literal["none", "auto", "required"] | NamedTool | None:
    choice = request.tool_choice
    if isinstance(choice, ResponseNamedTool):
        return NamedTool(type="function", function=NamedFunction(name=choice.name))
    return choice


def _said(item: InputMessage | InputCall | InputCallOutput) -> Message:
    """A message of a chat: what was said, a call that the model has asked for, or what came of one."""
    if isinstance(item, InputCall):
        call = FunctionCall(name=item.name, arguments=item.arguments)
        return Message(role="assistant", tool_calls=[ToolCall(id=item.call_id, type="function", function=call)])
    if isinstance(item, InputCallOutput):
        return Message(role="tool", tool_call_id=item.call_id, content=item.output)
    if isinstance(item.content, str):
        return Message(role=item.role, content=item.content)
    return Message(role=item.role, content=[TextPart(type="text", text=part.text) for part in item.content])
