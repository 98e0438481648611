"""The blocking client and the one for asyncio."""

from __future__ import annotations

import asyncio
import pathlib
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from types import TracebackType
from typing import Any, Self, TypeVar, Unpack

import grpc
import grpc.aio

from grok.serving.v1 import cluster_pb2, cluster_pb2_grpc, generation_pb2, generation_pb2_grpc
from grokmesh import calls
from grokmesh.calls import Call
from grokmesh.channel import DEFAULT_ADDRESS, Tls, channel_options, key_metadata
from grokmesh.completions import Completion, Options, ScoredText, ScoreOptions, completion_request
from grokmesh.resuming import ResumingStream

Result = TypeVar("Result")
#: The gateway's health service answers SERVING so.
_HEALTH, _SERVING = "/grpc.health.v1.Health/Check", b"\x08\x01"


class Client:
    """A connection to a gateway. Methods block; any thread may call them."""

    def __init__(
        self,
        address: str = DEFAULT_ADDRESS,
        *,
        api_key: str | None = None,
        tls: Tls | None = None,
        attempts: int = 10,
    ) -> None:
        options = channel_options(address, attempts)
        self._channel = (
            grpc.insecure_channel(address, options)
            if tls is None
            else grpc.secure_channel(address, tls.credentials(), options)
        )
        self._metadata = key_metadata(api_key)
        self._generation = generation_pb2_grpc.GenerationServiceStub(self._channel)
        self._cluster = cluster_pb2_grpc.ClusterServiceStub(self._channel)
        self._attempts = attempts

    def generate(
        self, prompt: str | Sequence[int], *, timeout: float | None = None, **options: Unpack[Options]
    ) -> Iterator[Completion]:
        """Streams a completion part by part. See Options. Closing it cancels the request."""
        stream = ResumingStream(completion_request(prompt, **options), self._attempts)
        while not stream.ended:
            call = self._generation.Generate(stream.request, timeout=timeout, metadata=self._metadata)
            pause = 0.0
            try:
                for response in call:
                    yield stream.take(response)
                stream.over()
            except grpc.RpcError as error:
                pause = stream.pause(error)
            finally:
                call.cancel()
            time.sleep(pause)

    def complete(
        self, prompt: str | Sequence[int], *, timeout: float | None = None, **options: Unpack[Options]
    ) -> Completion:
        """A whole completion. See Options."""
        return self._answer(calls.complete(prompt, **options), timeout)

    def score(
        self,
        context: str | Sequence[int],
        continuations: Sequence[str | Sequence[int]] = (),
        *,
        timeout: float | None = None,
        **options: Unpack[ScoreOptions],
    ) -> list[ScoredText]:
        """How probable the model finds each token of given text: of each continuation of the context, in their order, or of the
        context if there is none."""
        return self._answer(calls.score(context, continuations, **options), timeout)

    def tokenize(self, text: str, *, timeout: float | None = None) -> list[int]:
        """The tokens of a text."""
        return self._answer(calls.tokenize(text), timeout)

    def detokenize(self, ids: Sequence[int], *, timeout: float | None = None) -> str:
        """The text of tokens."""
        return self._answer(calls.detokenize(ids), timeout)

    def count_tokens(self, text: str, *, timeout: float | None = None) -> int:
        """The number of tokens of a text."""
        return self._answer(calls.count_tokens(text), timeout)

    def model(self, *, timeout: float | None = None) -> generation_pb2.GetModelResponse:
        """The served model."""
        return self._answer(calls.model(), timeout)

    def cancel(self, request_id: str, *, timeout: float | None = None) -> None:
        """Ends a completion that another call has begun, wherever it runs; that call raises ABORTED."""
        self._answer(calls.cancel(request_id), timeout)

    def load(self, *, timeout: float | None = None) -> generation_pb2.GetLoadResponse:
        """How busy the replicas are."""
        return self._answer(calls.load(), timeout)

    def status(self, *, timeout: float | None = None) -> cluster_pb2.GetStatusResponse:
        """Replicas, hosts and load."""
        return self._answer(calls.status(), timeout)

    def serving(self, *, timeout: float | None = None) -> bool:
        """Whether any replica serves, by the gateway's health service, which wants no key."""
        check = self._channel.unary_unary(_HEALTH, lambda message: message, lambda answer: answer)
        return bool(check(b"", timeout=timeout) == _SERVING)

    def restart(self, replica: int, *, timeout: float | None = None) -> int:
        """Gives a replica new worker processes; returns the number of its mesh when it serves again."""
        return self._answer(calls.restart(replica), timeout)

    def profile(
        self, replica: int, steps: int, *, timeout: float | None = None
    ) -> list[tuple[int, pathlib.PurePosixPath, bytes]]:
        """JAX profiler traces of a replica's next steps: rank of the host, path and content of each file."""
        request = cluster_pb2.ProfileRequest(replica=replica, steps=steps)
        files: dict[tuple[int, str], bytearray] = {}
        for piece in self._cluster.Profile(request, timeout=timeout, metadata=self._metadata):
            files.setdefault((piece.rank, piece.path), bytearray()).extend(piece.content)
        return [(rank, pathlib.PurePosixPath(path), bytes(content)) for (rank, path), content in files.items()]

    def close(self) -> None:
        """Ends the connection."""
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _answer(self, call: Call[Result], timeout: float | None) -> Result:
        serialize, parse = type(call.request).SerializeToString, call.response.FromString
        method = self._channel.unary_unary(call.path, serialize, parse)
        return call.result(method(call.request, timeout=timeout, metadata=self._metadata))


class AsyncClient:
    """As Client, for asyncio. Must be made inside a running event loop."""

    def __init__(
        self,
        address: str = DEFAULT_ADDRESS,
        *,
        api_key: str | None = None,
        tls: Tls | None = None,
        attempts: int = 10,
    ) -> None:
        options = channel_options(address, attempts)
        self._channel = (
            grpc.aio.insecure_channel(address, options)
            if tls is None
            else grpc.aio.secure_channel(address, tls.credentials(), options)
        )
        self._metadata = key_metadata(api_key)
        self._generation = generation_pb2_grpc.GenerationServiceStub(self._channel)
        self._attempts = attempts

    async def generate(
        self, prompt: str | Sequence[int], *, timeout: float | None = None, **options: Unpack[Options]
    ) -> AsyncIterator[Completion]:
        """As Client.generate."""
        stream = ResumingStream(completion_request(prompt, **options), self._attempts)
        while not stream.ended:
            call = self._generation.Generate(stream.request, timeout=timeout, metadata=self._metadata)
            pause = 0.0
            try:
                async for response in call:
                    yield stream.take(response)
                stream.over()
            except grpc.RpcError as error:
                pause = stream.pause(error)
            finally:
                call.cancel()
            await asyncio.sleep(pause)

    async def complete(
        self, prompt: str | Sequence[int], *, timeout: float | None = None, **options: Unpack[Options]
    ) -> Completion:
        """As Client.complete."""
        return await self._answer(calls.complete(prompt, **options), timeout)

    async def score(
        self,
        context: str | Sequence[int],
        continuations: Sequence[str | Sequence[int]] = (),
        *,
        timeout: float | None = None,
        **options: Unpack[ScoreOptions],
    ) -> list[ScoredText]:
        """As Client.score."""
        return await self._answer(calls.score(context, continuations, **options), timeout)

    async def tokenize(self, text: str, *, timeout: float | None = None) -> list[int]:
        """As Client.tokenize."""
        return await self._answer(calls.tokenize(text), timeout)

    async def detokenize(self, ids: Sequence[int], *, timeout: float | None = None) -> str:
        """As Client.detokenize."""
        return await self._answer(calls.detokenize(ids), timeout)

    async def count_tokens(self, text: str, *, timeout: float | None = None) -> int:
        """As Client.count_tokens."""
        return await self._answer(calls.count_tokens(text), timeout)

    async def model(self, *, timeout: float | None = None) -> generation_pb2.GetModelResponse:
        """As Client.model."""
        return await self._answer(calls.model(), timeout)

    async def cancel(self, request_id: str, *, timeout: float | None = None) -> None:
        """As Client.cancel."""
        await self._answer(calls.cancel(request_id), timeout)

    async def load(self, *, timeout: float | None = None) -> generation_pb2.GetLoadResponse:
        """As Client.load."""
        return await self._answer(calls.load(), timeout)

    async def status(self, *, timeout: float | None = None) -> cluster_pb2.GetStatusResponse:
        """As Client.status."""
        return await self._answer(calls.status(), timeout)

    async def close(self) -> None:
        """Ends the connection."""
        await self._channel.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def _answer(self, call: Call[Result], timeout: float | None) -> Result:
        serialize: Any = type(call.request).SerializeToString
        parse: Any = call.response.FromString
        method = self._channel.unary_unary(call.path, serialize, parse)
        return call.result(await method(call.request, timeout=timeout, metadata=self._metadata))
