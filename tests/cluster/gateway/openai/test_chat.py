"""Chats: what a template is given, and what becomes of tools and formats."""

from __future__ import annotations

import asyncio
import json
import pathlib
from typing import Any

import pytest

from cluster.gateway.errors import GatewayError
from cluster.gateway.openai.chat import ChatCompletions
from cluster.gateway.openai.chat_template import ChatTemplate, TemplateError, read_template
from cluster.gateway.openai.schema import ChatRequest
from grok.serving.v1 import generation_pb2
from tests.support.fake_service import CHAT_TEMPLATE, TOKENIZER

WEATHER = {
    "type": "function",
    "function": {"name": "weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}},
}
CLOCK = {"type": "function", "function": {"name": "clock"}}
TEMPLATE = ChatTemplate(CHAT_TEMPLATE, "test", "[EOS]")


def _made(template: ChatTemplate | None = TEMPLATE, **fields: object) -> ChatCompletions:
    body = {"model": "demo", "messages": [{"role": "user", "content": "hi"}], **fields}
    return ChatCompletions(ChatRequest.model_validate(body), template, TOKENIZER, {"id": "x"})


def _refusal(**fields: Any) -> str:
    with pytest.raises(GatewayError) as caught:
        _made(**fields)
    return str(caught.value)


class _Sessions:
    """Answers that are there already, in parts of a few characters."""

    def __init__(self, text: str) -> None:
        self._text = text

    async def whole(self, _: object) -> list[list[generation_pb2.GenerateOnceResponse]]:
        finish = generation_pb2.FINISH_REASON_EOS
        return [[generation_pb2.GenerateOnceResponse(text=self._text, finish_reason=finish)]]

    async def parts(self, _: object) -> Any:
        for start in range(0, len(self._text), 3):
            yield 0, generation_pb2.GenerateResponse(text=self._text[start : start + 3])
        yield 0, generation_pb2.GenerateResponse(finish_reason=generation_pb2.FINISH_REASON_EOS)


def _answered(made: ChatCompletions, text: str) -> dict[str, Any]:
    sessions: Any = _Sessions(text)
    (choice,) = asyncio.run(made.whole(sessions))["choices"]
    found: dict[str, Any] = choice
    return found


def test_parts_of_messages_are_one_text() -> None:
    parts = [{"type": "text", "text": "What is "}, {"type": "text", "text": "that?"}]
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": parts}]
    assert _made(messages=messages).completion.text == "SYSTEM: Be brief.\nUSER: What is that?\nASSISTANT:"


def test_a_model_without_a_template_says_what_to_do() -> None:
    problem = _refusal(template=None)
    assert "/v1/completions" in problem
    assert "chat_template.jinja" in problem


def test_formats_become_schemas() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    named = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    assert json.loads(_made(response_format=named).completion.json_schema) == schema
    assert _made(response_format={"type": "json_object"}).completion.json_object
    part = {"begin": "<call>", "schema": schema, "end": "</call>"}
    tags = {"type": "structural_tag", "structures": [part], "triggers": ["<call"]}
    (tag,) = _made(response_format=tags).completion.structural_tags.tags
    assert (tag.trigger, tag.begin, json.loads(tag.json_schema), tag.end) == ("<call", "<call>", schema, "</call>")
    assert not _made(response_format={"type": "text"}).completion.WhichOneof("format")
    assert _made(structured_outputs={"regex": "[a-c]+"}).completion.regex == "[a-c]+"
    assert list(_made(structured_outputs={"choice": ["a", "b"]}).completion.choice.texts) == ["a", "b"]
    assert "together" in _refusal(response_format={"type": "json_object"}, structured_outputs={"regex": "a"})


def test_a_tool_that_must_be_called_is_the_format() -> None:
    made = _made(tools=[WEATHER, CLOCK], tool_choice={"type": "function", "function": {"name": "weather"}})
    schema = json.loads(made.completion.json_schema)
    assert schema["properties"]["name"] == {"const": "weather"}
    assert schema["properties"]["arguments"] == WEATHER["function"]["parameters"]  # type: ignore[index]
    assert len(json.loads(_made(tools=[WEATHER, CLOCK], tool_choice="required").completion.json_schema)["anyOf"]) == 2
    assert "TOOL weather\n" in made.completion.text
    assert "TOOL clock" not in made.completion.text


def test_a_call_in_the_answer_is_told_from_text() -> None:
    made = _made(tools=[WEATHER, CLOCK])
    assert not made.completion.WhichOneof("format")
    choice = _answered(made, '{"name": "weather", "arguments": {"city": "Ulm"}}')
    (called,) = choice["message"]["tool_calls"]
    assert (choice["finish_reason"], choice["message"]["content"]) == ("tool_calls", None)
    assert called["function"] == {"name": "weather", "arguments": '{"city": "Ulm"}'}
    for text in ('{"name": "other", "arguments": {}}', '{"name": "clock"}', "It rains.", "[" * 10_000):
        choice = _answered(made, text)
        assert (choice["finish_reason"], choice["message"]) == ("stop", {"role": "assistant", "content": text})


def test_a_stream_tells_a_call_from_text_at_its_end() -> None:
    async def streamed(text: str) -> list[dict[str, Any]]:
        sessions: Any = _Sessions(text)
        return [c["choices"][0]["delta"] async for c in _made(tools=[CLOCK]).chunks(sessions)]

    *_, last = asyncio.run(streamed('{"name": "clock", "arguments": {}}'))
    assert last["tool_calls"][0]["function"] == {"name": "clock", "arguments": "{}"}
    *_, last = asyncio.run(streamed("It is late."))
    assert last["content"] == "It is late."


def test_tools_that_nobody_has_are_refused() -> None:
    assert "tools does not have" in _refusal(tool_choice="required")
    other = {"type": "function", "function": {"name": "other"}}
    assert "tools does not have" in _refusal(tools=[CLOCK], tool_choice=other)
    plain = ChatTemplate("{{ messages[0].content }}", "test", "")
    assert "knows no tools" in _refusal(template=plain, tools=[CLOCK])
    assert _made(template=plain, tools=[CLOCK], tool_choice="none").completion.text == "hi"


def test_earlier_calls_reach_the_template_as_objects() -> None:
    template = ChatTemplate("{{ messages[0].tool_calls[0].function.arguments.city }}", "test", "")
    call = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Ulm"}'}}
    assert _made(template=template, messages=[{"role": "assistant", "tool_calls": [call]}]).completion.text == "Ulm"


def test_what_a_template_refuses_is_the_clients_error() -> None:
    template = ChatTemplate("{{ raise_exception('roles must alternate') }}", "test", "")
    assert "roles must alternate" in _refusal(template=template)
    broken = ChatTemplate("{{ messages[0].content + 1 }}", "test", "")
    assert "messages" in _refusal(template=broken)
    escape = ChatTemplate("{{ ''.__class__.__mro__[1].__subclasses__() }}", "test", "")
    assert "messages" in _refusal(template=escape)


def test_a_template_lies_beside_the_checkpoint(tmp_path: pathlib.Path) -> None:
    assert read_template(tmp_path, "") is None
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": "from the configuration"}))
    found = read_template(tmp_path, "")
    assert found is not None
    assert found.render([], None) == "from the configuration"
    (tmp_path / "chat_template.jinja").write_text("from a file of its own{{ eos_token }}")
    found = read_template(tmp_path, "[EOS]")
    assert found is not None
    assert found.render([], None) == "from a file of its own[EOS]"
    (tmp_path / "chat_template.jinja").write_text("{% if %}")
    with pytest.raises(TemplateError, match=r"chat_template\.jinja"):
        read_template(tmp_path, "")
