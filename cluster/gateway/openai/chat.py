"""`/v1/chat/completions`: answers in a chat."""

from __future__ import annotations

import contextlib
import json
import secrets
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Any

import grpc

from cluster.gateway.errors import GatewayError, Violation, invalid
from cluster.gateway.openai.chat_template import FILE, ChatTemplate
from cluster.gateway.openai.schema import (
    ChatRequest,
    JsonObjectFormat,
    JsonSchemaFormat,
    Message,
    NamedTool,
    StructuralTagFormat,
    TextPart,
    Tool,
)
from cluster.gateway.openai.sessions import Sessions
from cluster.gateway.openai.translate import Spelling, finish_of, so_far, to_completion, usage_of
from grok.serving.v1 import generation_pb2
from workers.text.tokenizer import Tokenizer


class ChatCompletions:
    """The answers to one request."""

    def __init__(
        self, request: ChatRequest, template: ChatTemplate | None, tokenizer: Tokenizer, head: dict[str, Any]
    ) -> None:
        """`head` begins every object of the answer. Raises GatewayError."""
        if template is None:
            raise GatewayError(
                grpc.StatusCode.INVALID_ARGUMENT,
                "NO_CHAT_TEMPLATE",
                f"this model has no chat template: a base model goes on with text, so call /v1/completions; or put a {FILE} "
                "beside its tokenizer.model, as docs/openai.md shows",
            )
        self._request = request
        self._head = head
        self._spelling = Spelling(tokenizer)
        self._tools = _tools(request, template)
        called = request.tool_choice not in (None, "none", "auto")
        prompt = template.render(_messages(request.messages), [tool.model_dump() for tool in self._tools] or None)
        most = request.max_tokens if request.max_completion_tokens is None else request.max_completion_tokens
        n = 1 if request.n is None else request.n
        _check(request, n, called=called)
        self.completion = to_completion(request, prompt, most, n)
        self.completion.top_logprobs = (request.top_logprobs or 0) if request.logprobs else 0
        if called:
            self.completion.json_schema = json.dumps(_call_schema(self._tools))
        elif isinstance(request.response_format, JsonObjectFormat):
            self.completion.json_object = True
        elif isinstance(request.response_format, StructuralTagFormat):
            self.completion.structural_tags.tags.extend(_tags(request.response_format))
        elif isinstance(request.response_format, JsonSchemaFormat):
            self.completion.json_schema = json.dumps(request.response_format.json_schema.json_schema)

    async def whole(self, sessions: Sessions) -> dict[str, Any]:
        (answers,) = await sessions.whole([self.completion])
        choices = []
        for index, answer in enumerate(answers):
            message, finish = self._message(answer.text, answer.finish_reason)
            choices.append(
                {"index": index, "message": {"role": "assistant", **message}, "finish_reason": finish}
                | {"logprobs": self._logprobs(answer.tokens)}
            )
        usage = usage_of([answer.usage for answer in answers], len(answers))
        return {**self._head, "object": "chat.completion", "choices": choices, "usage": usage}

    async def chunks(self, sessions: Sessions) -> AsyncIterator[dict[str, Any]]:
        """The objects of a stream. Where tools may be called, an answer comes at once, when it is known what it is."""
        options = self._request.stream_options
        head = {**self._head, "object": "chat.completion.chunk"}
        usages: dict[int, generation_pb2.Usage] = {}
        texts: dict[int, str] = {}
        if options is not None and options.include_usage:
            head["usage"] = None
        begun = False
        async for _, part in sessions.parts([self.completion]):
            for index in range(0 if begun else self.completion.n):
                yield {**head, "choices": [_delta(index, {"role": "assistant", "content": ""})]}
            begun = True
            delta: dict[str, Any] = {"content": part.text} if part.text else {}
            finish = finish_of(part.finish_reason)
            if self._tools:
                texts[part.index] = texts.get(part.index, "") + part.text
                delta = {}
                if finish is not None:
                    delta, finish = self._message(texts[part.index], part.finish_reason)
                    delta |= {"tool_calls": [{"index": i, **c} for i, c in enumerate(delta.pop("tool_calls", ()))]}
            if part.HasField("usage"):
                usages[part.index] = part.usage
            logprobs = self._logprobs(part.tokens)
            if delta or finish or logprobs:
                yield {**head, "choices": [_delta(part.index, delta, finish, logprobs)], **so_far(part, options)}
        if options is not None and options.include_usage:
            yield {**head, "choices": [], "usage": usage_of([usages[index] for index in sorted(usages)], len(usages))}

    def _message(self, text: str, reason: generation_pb2.FinishReason.ValueType) -> tuple[dict[str, Any], str | None]:
        """An assistant's message, and why it has ended: as a tool's call if it is one."""
        called = _called(text, self._tools)
        if called is None:
            return {"content": text}, finish_of(reason)
        return {"content": None, "tool_calls": [called]}, "tool_calls"

    def _logprobs(self, tokens: Sequence[generation_pb2.GeneratedToken]) -> dict[str, Any] | None:
        return self._spelling.of_chat(tokens) if self._request.logprobs else None


def _check(request: ChatRequest, n: int, *, called: bool) -> None:
    """Raises GatewayError for what only this interface knows."""
    violations = []
    if n < 1:
        violations.append(Violation("n", f"is {n}; must be at least 1"))
    if request.top_logprobs and not request.logprobs:
        violations.append(Violation("top_logprobs", "can be given only with logprobs"))
    formats = [
        name
        for name, is_set in (
            ("tool_choice", called),
            ("response_format", request.response_format is not None and request.response_format.type != "text"),
            ("structured_outputs", request.structured_outputs is not None),
        )
        if is_set
    ]
    if len(formats) > 1:
        violations.append(Violation(formats[1], f"can't be set together with {formats[0]}"))
    if violations:
        raise invalid(violations)


def _messages(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """As templates know them: contents are texts, arguments objects."""
    found = []
    for message in messages:
        plain = message.model_dump(exclude_none=True)
        plain["content"] = _text(message.content)
        for call in plain.get("tool_calls", ()):
            with contextlib.suppress(ValueError):  # what is no JSON stays a text
                call["function"]["arguments"] = json.loads(call["function"]["arguments"])
        found.append(plain)
    return found


def _tags(wanted: StructuralTagFormat) -> Iterator[generation_pb2.StructuralTag]:
    """Each structure with the trigger that it begins with, if there is one: else the service names what is wrong."""
    for one in wanted.structures:
        trigger = next((trigger for trigger in wanted.triggers if trigger and one.begin.startswith(trigger)), "")
        schema = json.dumps(one.json_schema)
        yield generation_pb2.StructuralTag(trigger=trigger, begin=one.begin, json_schema=schema, end=one.end)


def _text(content: str | Sequence[TextPart] | None) -> str:
    return content if isinstance(content, str) else "".join(part.text for part in content or ())


def _tools(request: ChatRequest, template: ChatTemplate) -> list[Tool]:
    """Those that may be called. Raises GatewayError."""
    tools, choice = request.tools or [], request.tool_choice
    if isinstance(choice, NamedTool):
        tools = [tool for tool in tools if tool.function.name == choice.function.name]
    if not tools and choice not in (None, "none", "auto"):
        raise invalid([Violation("tool_choice", "chooses a tool that tools does not have")])
    if choice == "none" or not tools:
        return []
    if not template.knows_tools:
        raise invalid([Violation("tools", "the model's chat template knows no tools")])
    return tools


def _call_schema(tools: Sequence[Tool]) -> dict[str, Any]:
    """A JSON schema of a call of one of these."""
    calls = [
        {
            "type": "object",
            "properties": {
                "name": {"const": tool.function.name},
                "arguments": tool.function.parameters or {"type": "object"},
            },
            "required": ["name", "arguments"],
            "additionalProperties": False,
        }
        for tool in tools
    ]
    return calls[0] if len(calls) == 1 else {"anyOf": calls}


def _called(text: str, tools: Sequence[Tool]) -> dict[str, Any] | None:
    """The call that a text is: a JSON object with the `name` of one of the tools and `arguments`; None if it is no call."""
    try:
        found = json.loads(text) if tools else None
    except (ValueError, RecursionError):
        return None
    if not isinstance(found, dict) or not isinstance(found.get("arguments"), dict):
        return None
    if found.get("name") not in [tool.function.name for tool in tools]:
        return None
    function = {"name": found["name"], "arguments": json.dumps(found["arguments"], ensure_ascii=False)}
    return {"id": f"call_{secrets.token_hex(12)}", "type": "function", "function": function}


def _delta(
    index: int, delta: dict[str, Any], finish: str | None = None, logprobs: dict[str, Any] | None = None
) -> dict[str, Any]:
    return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}
