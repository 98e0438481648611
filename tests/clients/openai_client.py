"""OpenAI's own client: synchronous, asynchronous, streaming, structured outputs, tools."""

from __future__ import annotations

import asyncio
import json
import os

import openai
import pydantic
import pytest

URL = os.environ["GROKMESH_HTTP"]
CLIENT = openai.OpenAI(base_url=f"{URL}/v1", api_key="none", max_retries=0)
PROMPT = "And it came to pass"
CHAT = [{"role": "user", "content": "Who goes there?"}]


def test_models_are_listed():
    assert [model.id for model in CLIENT.models.list()] == ["demo"]
    assert CLIENT.models.retrieve("demo").id == "demo"


def test_a_stream_comes_to_what_a_whole_answer_is():
    asked = {"model": "demo", "prompt": PROMPT, "max_tokens": 24, "seed": 5}
    whole = CLIENT.completions.create(**asked)
    parts = list(CLIENT.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    assert "".join(choice.text for part in parts for choice in part.choices) == whole.choices[0].text
    assert parts[-1].usage == whole.usage
    assert whole.usage.completion_tokens == 24


def test_several_prompts_and_completions_have_their_places():
    answer = CLIENT.completions.create(model="demo", prompt=[PROMPT, "In the beginning"], n=2, max_tokens=8, seed=1)
    alone = CLIENT.completions.create(model="demo", prompt="In the beginning", max_tokens=8, seed=2)
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert answer.choices[3].text == alone.choices[0].text


def test_logprobs_are_parsed():
    answer = CLIENT.completions.create(model="demo", prompt=PROMPT, max_tokens=4, logprobs=3, temperature=0)
    found = answer.choices[0].logprobs
    assert len(found.tokens) == len(found.token_logprobs) == 4
    assert [max(top.values()) for top in found.top_logprobs] == pytest.approx(found.token_logprobs)


def test_a_chat_streams_and_an_asynchronous_client_gets_the_same():
    asked = {"model": "demo", "messages": CHAT, "max_completion_tokens": 16, "seed": 3}
    whole = CLIENT.chat.completions.create(**asked)
    with CLIENT.chat.completions.stream(**asked) as stream:
        streamed = "".join(event.delta for event in stream if event.type == "content.delta")

    async def ask():
        async with openai.AsyncOpenAI(base_url=f"{URL}/v1", api_key="none") as client:
            return await client.chat.completions.create(**asked)

    assert whole.choices[0].message.content == streamed == asyncio.run(ask()).choices[0].message.content


def test_structured_outputs_become_objects():
    class Answer(pydantic.BaseModel):
        day: int
        open: bool

    parsed = CLIENT.chat.completions.parse(model="demo", messages=CHAT, response_format=Answer, seed=1)
    assert isinstance(parsed.choices[0].message.parsed, Answer)


def test_a_tool_that_must_be_called_is():
    tool = {
        "type": "function",
        "function": {
            "name": "open_gate",
            "parameters": {
                "type": "object",
                "properties": {"wide": {"type": "boolean"}},
                "required": ["wide"],
                "additionalProperties": False,
            },
        },
    }
    answer = CLIENT.chat.completions.create(model="demo", messages=CHAT, tools=[tool], tool_choice="required", seed=1)
    (called,) = answer.choices[0].message.tool_calls
    assert called.function.name == "open_gate"
    assert isinstance(json.loads(called.function.arguments)["wide"], bool)
    assert answer.choices[0].finish_reason == "tool_calls"


def test_errors_are_the_clients_own():
    with pytest.raises(openai.BadRequestError) as caught:
        CLIENT.completions.create(model="demo", prompt=PROMPT, temperature=-1)
    assert caught.value.param == "temperature"
    with pytest.raises(openai.NotFoundError):
        CLIENT.completions.create(model="other", prompt=PROMPT)
    with pytest.raises(openai.APITimeoutError):
        CLIENT.completions.create(
            model="demo", prompt=PROMPT, max_tokens=400, timeout=0.05, extra_body={"ignore_eos": True}
        )


def test_extra_fields_go_in_the_body():
    asked = {"model": "demo", "prompt": PROMPT, "max_tokens": 8}
    answer = CLIENT.completions.create(**asked, extra_body={"structured_outputs": {"choice": ["yes", "no"]}})
    assert answer.choices[0].text in ("yes", "no")


def test_responses_stream_to_what_whole_ones_are():
    asked = {"model": "demo", "input": "Who goes there?", "max_output_tokens": 16, "extra_body": {"seed": 3}}
    whole = CLIENT.responses.create(**asked)
    chat = CLIENT.chat.completions.create(model="demo", messages=CHAT, max_completion_tokens=16, seed=3)
    assert whole.output_text == chat.choices[0].message.content
    assert (whole.status, whole.usage.output_tokens) == ("incomplete", 16)
    with CLIENT.responses.stream(**asked) as stream:
        streamed = "".join(event.delta for event in stream if event.type == "response.output_text.delta")
    assert streamed == whole.output_text


def test_a_response_may_be_an_object_or_a_call():
    class Person(pydantic.BaseModel, extra="forbid"):
        age: int = pydantic.Field(ge=0, le=99)

    asked = {"model": "demo", "input": "How old?", "text_format": Person, "extra_body": {"seed": 1}}
    parsed = CLIENT.responses.parse(**asked)
    assert isinstance(parsed.output_parsed, Person)
    with CLIENT.responses.stream(**asked) as stream:
        assert stream.get_final_response().output_parsed == parsed.output_parsed
    tool = {"type": "function", "name": "weather", "parameters": Person.model_json_schema(), "strict": True}
    asked = {"model": "demo", "input": "Is it warm?", "tools": [tool], "tool_choice": "required"}
    (called,) = CLIENT.responses.create(**asked).output
    assert called.name == "weather"
    assert isinstance(json.loads(called.arguments)["age"], int)
    said = [{"role": "user", "content": "Is it warm?"}, called.model_dump(exclude_none=True)]
    said.append({"type": "function_call_output", "call_id": called.call_id, "output": "20"})
    told = CLIENT.responses.create(model="demo", input=said, max_output_tokens=4)
    assert told.output[0].content[0].text == told.output_text
