"""The playground in a browser, with mouse and keyboard, on a gateway whose mesh computes nothing."""

from __future__ import annotations

import asyncio
import pathlib
import re
import urllib.request
from collections.abc import Iterator

import pytest

from cluster.gateway.openai.playground import Playground
from tests.support.chromium import Page, browsing
from tests.support.debian import require
from tests.support.fake_service import serving
from tests.support.http_calls import call
from tests.support.ports import free_port


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """Of the HTTP interface."""
    address = f"127.0.0.1:{free_port('127.0.0.1')}"
    with serving(0.02, http_address=address):
        yield address


async def _fill(page: Page, field: str, value: str) -> None:
    await page.do(
        f"at('{field}').value = {value!r}; at('{field}').dispatchEvent(new Event('input', {{bubbles: true}}))"
    )


async def _completed(page: Page) -> str:
    await page.until("!running && at('status').textContent.includes('tokens in')")
    return str(await page.do("at('output').textContent"))


def test_the_page_asks_nobody_but_its_gateway(address: str) -> None:
    with urllib.request.urlopen(f"http://{address}/") as answer:
        text, policy = answer.read().decode(), answer.headers["content-security-policy"]
    assert text == Playground.read().text
    assert not re.search(r"""(src|href)=["']?(https?:)?//""", text)
    assert "connect-src 'self'" in policy
    assert "unsafe" not in policy


def test_a_text_is_completed_as_the_interface_completes_it(address: str, tmp_path: pathlib.Path) -> None:
    require(chromium="chromium")
    asked = {"model": "demo", "prompt": "In the beginning", "max_tokens": 20, "temperature": 0.8, "seed": 7}
    expected = call(address, "/v1/completions", asked)[2]["choices"][0]["text"]

    async def check() -> None:
        async with browsing(tmp_path, f"http://{address}/") as page:
            await page.until("typeof model !== 'undefined' && model")
            await _fill(page, "max_tokens", "20")
            await _fill(page, "seed", "7")
            await page.do("at('prompt').focus()")
            await page.press("Enter", modifiers=2)
            assert await _completed(page) == asked["prompt"] + expected
            assert "replica 0, epoch 1" in await page.do("at('status').textContent")
            assert await page.do("tokens.length") == 20
            await page.do("at('output').focus()")
            await page.press("ArrowRight")
            await page.press("ArrowRight")
            told = await page.do("at('token').textContent")
            assert told.startswith("Token 2 of 20")
            assert told.endswith("36.8 %")
            assert '"seed": 7' in await page.do("at('curl').textContent")
            assert "client.completions.create" in await page.do("at('python').textContent")
            assert "GenerationService/Generate" in await page.do("at('grpcurl').textContent")
            await page.until("at('experts').rows.length > 0")
            assert page.complaints == []

    asyncio.run(check())


def test_a_chat_goes_on_and_can_be_cancelled(address: str, tmp_path: pathlib.Path) -> None:
    require(chromium="chromium")

    async def check() -> None:
        async with browsing(tmp_path, f"http://{address}/") as page:
            await page.until("typeof model !== 'undefined' && model")
            await page.do("at('chat').click()")
            for text in ("Who goes?", "And now?"):
                await _fill(page, "prompt", text)
                await _fill(page, "max_tokens", "8")
                await page.do("at('run').click()")
                assert text in await _completed(page)
            assert await page.do("messages.length") == 4
            await _fill(page, "max_tokens", "400")
            await page.do("at('run').click()")
            await page.until("tokens.length > 3")
            await page.press("Escape")
            await page.until("at('status').textContent.startsWith('cancelled')")
            await _fill(page, "temperature", "-1")
            await page.do("at('run').click()")
            await page.until("at('error').textContent.includes('temperature')")

    asyncio.run(check())
