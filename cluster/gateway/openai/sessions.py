"""Asks the service for completions as gRPC's clients do, and ends them in time."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Coroutine, Iterable, Sequence
from typing import Any, TypeVar

from cluster.gateway.call import begin_part
from cluster.gateway.openai.errors import too_late, unread
from cluster.gateway.service import GenerationService
from cluster.together import together
from grok.serving.v1 import generation_pb2

Result = TypeVar("Result")


class Deadline:
    """When a call must have been answered; what the service takes for gRPC's context."""

    def __init__(self, seconds: float | None) -> None:
        self.at = None if seconds is None else asyncio.get_running_loop().time() + seconds

    def time_remaining(self) -> float | None:
        """Seconds that are left, None for no limit."""
        return None if self.at is None else self.at - asyncio.get_running_loop().time()


class Sessions:
    """Of one call: a completion for each of its prompts, or several."""

    def __init__(self, service: GenerationService, deadline: Deadline) -> None:
        self._service = service
        self._context: Any = deadline
        self._at = deadline.at

    async def whole(
        self, completions: Sequence[generation_pb2.Completion]
    ) -> list[list[generation_pb2.GenerateOnceResponse]]:
        """What they come to, those of each prompt by themselves. If one fails, so do all. Raises GatewayError."""

        async def one(index: int, completion: generation_pb2.Completion) -> list[generation_pb2.GenerateOnceResponse]:
            begin_part(index)
            request = generation_pb2.GenerateOnceRequest(completion=completion)
            answer = await self._service.GenerateOnce(request, self._context)
            return [answer, *answer.others]

        return await self._all(one(i, completion) for i, completion in enumerate(completions))

    async def parts(
        self, completions: Sequence[generation_pb2.Completion]
    ) -> AsyncGenerator[tuple[int, generation_pb2.GenerateResponse], None]:
        """Their parts as they come, each with the number of its prompt. Raises GatewayError."""
        arrived: asyncio.Queue[tuple[int, generation_pb2.GenerateResponse] | Exception | None] = asyncio.Queue(1)

        async def one(index: int, completion: generation_pb2.Completion) -> None:
            begin_part(index)
            request = generation_pb2.GenerateRequest(completion=completion)
            stream: Any = self._service.Generate(request, self._context)
            try:
                async with contextlib.aclosing(stream) as parts:
                    async for part in parts:
                        await arrived.put((index, part))
            except asyncio.CancelledError:
                in_time = self._at is None or asyncio.get_running_loop().time() < self._at
                if wanted and in_time:
                    raise unread() from None
                raise

        async def work() -> None:
            try:
                await self._all(one(i, completion) for i, completion in enumerate(completions))
            except Exception as error:
                await arrived.put(error)
            await arrived.put(None)

        wanted = True
        working = asyncio.ensure_future(work())
        try:
            while (part := await arrived.get()) is not None:
                if isinstance(part, Exception):
                    raise part
                yield part
        finally:
            wanted = False
            working.cancel()
            await asyncio.gather(working, return_exceptions=True)

    async def _all(self, works: Iterable[Coroutine[Any, Any, Result]]) -> list[Result]:
        """See `together`. Raises GatewayError when time is over."""
        try:
            async with asyncio.timeout_at(self._at):
                return await together(works)
        except TimeoutError:
            raise too_late() from None
