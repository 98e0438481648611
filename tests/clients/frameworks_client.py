"""What is built on OpenAI's interface: LangChain and LiteLLM."""

from __future__ import annotations

import os

import langchain_openai
import litellm

URL = os.environ["GROKMESH_HTTP"]
PROMPT = "And it came to pass"


def test_langchain_completes_and_chats():
    options = {"model": "demo", "base_url": f"{URL}/v1", "api_key": "none", "seed": 4}
    text = langchain_openai.OpenAI(**options, max_tokens=12)
    assert "".join(text.stream(PROMPT)) == text.invoke(PROMPT)
    chat = langchain_openai.ChatOpenAI(**options, max_completion_tokens=12)
    answer = chat.invoke("Who goes there?")
    assert answer.content == "".join(part.content for part in chat.stream("Who goes there?"))
    assert answer.usage_metadata["output_tokens"] == 12


def test_litellm_completes_and_chats():
    options = {"api_base": f"{URL}/v1", "api_key": "none", "max_tokens": 12, "seed": 4}
    text = litellm.text_completion(model="text-completion-openai/demo", prompt=PROMPT, **options)
    assert text.usage.completion_tokens == 12
    messages = [{"role": "user", "content": "Who goes there?"}]
    whole = litellm.completion(model="openai/demo", messages=messages, **options)
    parts = litellm.completion(model="openai/demo", messages=messages, stream=True, **options)
    assert whole.choices[0].message.content == "".join(part.choices[0].delta.content or "" for part in parts)
