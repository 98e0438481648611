"""Headless Chromium, with nothing of its own going out to a network."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import itertools
import json
import pathlib
import subprocess
from collections.abc import AsyncIterator
from typing import Any

import aiohttp

_OPTIONS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
)  # fmt: skip


def chromium(profile: pathlib.Path, *arguments: str) -> str:
    """Runs it on an empty profile and returns what it prints."""
    command = ["chromium", *_OPTIONS, f"--user-data-dir={profile}", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout


class Page:
    """A page in a browser, by Chromium's DevTools protocol."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self._socket = socket
        self._numbers = itertools.count(1)
        #: Errors of scripts, and what the browser warns of.
        self.complaints: list[str] = []

    async def call(self, method: str, **parameters: Any) -> Any:
        """The answer to a command."""
        number = next(self._numbers)
        await self._socket.send_json({"id": number, "method": method, "params": parameters})
        while True:
            message = await self._socket.receive_json(timeout=60)
            if message.get("id") == number:
                assert "error" not in message, message
                return message["result"]
            entry = message.get("params", {}).get("entry", {})
            if message.get("method") == "Runtime.exceptionThrown" or entry.get("level") in ("warning", "error"):
                self.complaints.append(json.dumps(message["params"]))

    async def do(self, script: str) -> Any:
        """What a script comes to."""
        done = await self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in done, done
        return done["result"].get("value")

    async def until(self, script: str, seconds: float = 60) -> None:
        """Returns once a script comes to something true."""
        async with asyncio.timeout(seconds):
            while not await self.do(script):
                await asyncio.sleep(0.05)

    async def press(self, key: str, modifiers: int = 0) -> None:
        """Presses a key, with modifiers as the protocol numbers them: 2 is Ctrl."""
        for kind in ("keyDown", "keyUp"):
            await self.call("Input.dispatchKeyEvent", type=kind, key=key, modifiers=modifiers)

    async def picture(self, path: pathlib.Path) -> None:
        """Writes a PNG of what is to be seen."""
        shot = await self.call("Page.captureScreenshot", format="png")
        path.write_bytes(base64.b64decode(shot["data"]))


@contextlib.asynccontextmanager
async def browsing(profile: pathlib.Path, url: str, width: int = 1200, height: int = 900) -> AsyncIterator[Page]:
    """A page that is open for the block."""
    command = ["chromium", *_OPTIONS, f"--user-data-dir={profile}", "--remote-debugging-port=0"]
    process = await asyncio.create_subprocess_exec(
        *command, f"--window-size={width},{height}", "about:blank", stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        found = profile / "DevToolsActivePort"
        async with asyncio.timeout(30):
            while not found.exists() or not found.read_text().strip():
                await asyncio.sleep(0.05)
        port = found.read_text().split()[0]
        async with aiohttp.ClientSession() as session:
            async with session.get(f"http://127.0.0.1:{port}/json/list") as answer:
                (target,) = [one for one in await answer.json() if one["type"] == "page"]
            async with session.ws_connect(target["webSocketDebuggerUrl"], max_msg_size=0) as socket:
                page = Page(socket)
                for domain in ("Runtime", "Log", "Page"):
                    await page.call(f"{domain}.enable")
                await page.call("Page.navigate", url=url)
                yield page
    finally:
        process.kill()
        await process.wait()
