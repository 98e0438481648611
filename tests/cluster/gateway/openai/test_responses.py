"""`/v1/responses`: what a chat's answer is, in another form."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.support.fake_service import serving
from tests.support.http_calls import call
from tests.support.ports import free_port


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """Of the HTTP interface."""
    address = f"127.0.0.1:{free_port('127.0.0.1')}"
    with serving(http_address=address):
        yield address


def _ask(address: str, **fields: object) -> Any:
    status, _, body = call(address, "/v1/responses", {"model": "demo", "input": "Who goes?", **fields})
    assert status == 200, body
    return body


def test_it_says_what_the_chat_says(address: str) -> None:
    answer = _ask(address, max_output_tokens=5, instructions="Be brief.")
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Who goes?"}]
    asked = {"model": "demo", "messages": messages, "max_tokens": 5}
    chat = call(address, "/v1/chat/completions", asked)[2]
    (item,) = answer["output"]
    assert item["content"][0]["text"] == chat["choices"][0]["message"]["content"]
    assert answer["usage"]["total_tokens"] == chat["usage"]["total_tokens"]
    assert (answer["status"], answer["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})


def test_events_come_in_order_and_come_to_the_answer(address: str) -> None:
    events = _ask(address, max_output_tokens=5, stream=True, seed=1)
    kinds = [event["type"].removeprefix("response.") for event in events]
    assert kinds[:4] == ["created", "in_progress", "output_item.added", "content_part.added"]
    assert kinds[-4:] == ["output_text.done", "content_part.done", "output_item.done", "incomplete"]
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    text = "".join(event["delta"] for event in events if event["type"] == "response.output_text.delta")
    assert events[-1]["response"]["output"][0]["content"][0]["text"] == text == events[-4]["text"]


def test_what_would_have_to_be_kept_is_refused_by_name(address: str) -> None:
    body = {"model": "demo", "input": "x", "previous_response_id": "resp-1"}
    status, _, answer = call(address, "/v1/responses", body)
    assert (status, answer["error"]["param"]) == (400, "previous_response_id")
