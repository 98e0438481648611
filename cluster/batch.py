"""Files of requests in OpenAI's batch format, answered line by line: what has been answered once is never asked again."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import fcntl
import json
import os
import pathlib
import ssl
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO

import aiohttp

from cluster.commands.access import UsageError
from cluster.together import together

#: What a line may ask for.
URLS = ("/v1/completions", "/v1/chat/completions")
#: Answers after which a request is sent again: the service is full, or away. Not 500: the request may be what breaks it.
_AGAIN = (429, 502, 503, 504)
#: Seconds before a request is sent again, at first and at most, unless the service says when.
FIRST_PAUSE, MOST_PAUSE = 0.5, 15.0


class BatchError(UsageError):
    """Files that can't be used, or a service that can't be reached."""


@dataclasses.dataclass(frozen=True)
class Line:
    """A request. `name` is its custom_id."""

    name: str
    url: str
    body: dict[str, Any]


def read_requests(path: pathlib.Path) -> list[Line]:
    """The requests of a file. Raises BatchError, which names file and line."""
    lines: list[Line] = []
    names: set[str] = set()
    try:
        with path.open(encoding="utf-8-sig") as file:
            for number, text in enumerate(file, 1):
                if text.strip():
                    line = _parse(text, f"{path}:{number}")
                    if line.name in names:
                        raise BatchError(f"{path}:{number}: custom_id {line.name!r} is there twice")
                    names.add(line.name)
                    lines.append(line)
    except (OSError, UnicodeDecodeError) as error:
        raise BatchError(f"{path}: {error}") from error
    return lines


def _parse(text: str, where: str) -> Line:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BatchError(f"{where}: no JSON: {error}") from error
    if not isinstance(found, dict) or not isinstance(found.get("custom_id"), str):
        raise BatchError(f"{where}: must be an object with a text custom_id")
    if found.get("method", "POST") != "POST" or found.get("url") not in URLS:
        raise BatchError(f"{where}: method must be POST and url one of {', '.join(URLS)}")
    body = found.get("body")
    if not isinstance(body, dict) or body.get("stream"):
        raise BatchError(f"{where}: body must be an object, without stream")
    return Line(found["custom_id"], found["url"], body)


class Results:
    """The file of answers, which one process writes at a time."""

    def __init__(self, file: BinaryIO, done: set[str]) -> None:
        #: Names of the requests that have been answered.
        self.done = done
        self._file = file

    def add(self, answer: dict[str, Any]) -> None:
        self._file.write(json.dumps(answer, ensure_ascii=False).encode() + b"\n")
        self._file.flush()


@contextlib.contextmanager
def open_results(path: pathlib.Path) -> Iterator[Results]:
    """Goes on with a file of answers, or begins one. A line that a killed process has not ended is taken away. Raises
    BatchError."""
    try:
        with path.open("a+b") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise BatchError(f"{path}: another process writes there") from None
            file.seek(0)
            done: set[str] = set()
            whole = 0
            for number, line in enumerate(file, 1):
                if not line.endswith(b"\n"):
                    break
                try:
                    done.add(json.loads(line)["custom_id"])
                except (ValueError, TypeError, KeyError) as error:
                    raise BatchError(f"{path}:{number}: no answer of a batch: {error!r}") from error
                whole += len(line)
            os.truncate(file.fileno(), whole)
            yield Results(file, done)
    except OSError as error:
        raise BatchError(f"{path}: {error}") from error


class Batch:
    """Sends requests, a few at a time, until each has an answer."""

    def __init__(
        self, url: str, api_key: str | None, tls: ssl.SSLContext | None, priority: int, patience: float
    ) -> None:
        """`url` is the service's; `priority` that of requests that name none; after `patience` seconds without any answer it
        gives up."""
        self._url = url
        self._headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
        self._tls = tls
        self._priority = priority
        self._patience = patience
        self._answered = 0.0

    async def run(self, lines: list[Line], results: Results, at_once: int, answered: Callable[[bool], None]) -> None:
        """Answers those that have no answer yet; `answered` gets for each whether it has succeeded. Raises BatchError."""
        waiting = iter([line for line in lines if line.name not in results.done])
        self._answered = asyncio.get_running_loop().time()
        connector = aiohttp.TCPConnector(limit=at_once)
        timeout = aiohttp.ClientTimeout(total=None)
        async with aiohttp.ClientSession(
            self._url, connector=connector, timeout=timeout, headers=self._headers
        ) as session:

            async def work() -> None:
                for line in waiting:
                    answer = await self._ask(session, line)
                    results.add(answer)
                    answered(answer["error"] is None)

            await together(work() for _ in range(at_once))

    async def _ask(self, session: aiohttp.ClientSession, line: Line) -> dict[str, Any]:
        """The answer to a request, as it stands in the file."""
        loop, pause = asyncio.get_running_loop(), FIRST_PAUSE
        while True:
            problem, retry_after = "", 0.0
            try:
                body = {"priority": self._priority, **line.body}
                async with session.post(line.url, json=body, ssl=self._tls or True) as response:
                    content = await response.json(content_type=None)
                    if response.status not in _AGAIN:
                        self._answered = loop.time()
                        return _answer(line, response.status, response.headers.get("x-request-id", ""), content)
                    problem = f"{response.status}: {content}"
                    retry_after = float(response.headers.get("retry-after", 0))
            except (aiohttp.ClientError, OSError, ValueError) as error:
                problem = str(error) or type(error).__name__
            if loop.time() - self._answered > self._patience:
                raise BatchError(
                    f"{self._url} has not answered for {self._patience:g} s: {problem}; run it again to go on"
                )
            await asyncio.sleep(max(pause, retry_after))
            pause = min(2 * pause, MOST_PAUSE)


def _answer(line: Line, status: int, request_id: str, content: Any) -> dict[str, Any]:
    failed = status >= 400
    error = content.get("error") if failed and isinstance(content, dict) else None
    return {
        "id": f"batch_req_{request_id}",
        "custom_id": line.name,
        "response": {"status_code": status, "request_id": request_id, "body": content},
        "error": (error or {"message": f"status {status}"}) if failed else None,
    }
