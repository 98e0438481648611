"""The Python client.

    from cluster.client import Client

    with Client("127.0.0.1:50051") as client:
        for part in client.generate("In the beginning", max_tokens=64, temperature=0.7):
            print(part.text, end="")

`AsyncClient` has the same methods for asyncio, but for those of operators. A call that fails with UNAVAILABLE is tried again
with growing pauses (at least as long as the server asks for). A stream that broke goes on after what it has brought, at
whichever gateway answers; but one of several completions at once, with `n`, does not. Any other error is raised as
grpc.RpcError. An address may list several gateways, as gRPC has it: `ipv4:10.0.0.1:50051,10.0.0.2:50051`. Where the service
wants API keys, give yours as `api_key`; where it has a certificate, say as `tls` who signed it.
"""

from __future__ import annotations

import asyncio
import dataclasses
import pathlib
import random
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, Self, TypedDict, TypeVar, Unpack

import grpc
import grpc.aio
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_status import rpc_status

from grok.serving.v1 import cluster_pb2, cluster_pb2_grpc, generation_pb2, generation_pb2_grpc

DEFAULT_ADDRESS = "127.0.0.1:50051"
#: Environment variable in which the `grokmesh` command looks for an API key.
API_KEY_VARIABLE = "GROKMESH_API_KEY"
_FIRST_PAUSE, _LONGEST_PAUSE = 0.2, 10.0
#: Of pauses: not the one that programs seed for their own ends.
_RANDOM = random.Random()
#: What gRPC says of calls whose channel was closed meanwhile.
_CLOSED = "Channel closed"

Request = TypeVar("Request")
Response = TypeVar("Response")


class ClientError(ValueError):
    """Something that a client can't be made of."""


@dataclasses.dataclass(frozen=True)
class Token:
    """A token, its logarithmic probability under the model, and the likeliest tokens at its place with theirs."""

    id: int
    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclasses.dataclass(frozen=True)
class Completion:
    """A completion, or a part of one.

    Attributes:
      request_id: names the request in the server's logs.
      text: of the tokens; in a part, what is new.
      tokens: in order; in a part, those that are new.
      finish_reason: `eos`, `stop` or `length`; None in all parts but the last.
      prompt_tokens: 0 in all parts but the last.
      seed: with which the same request gives the same tokens.
      index: of the completion, where several were asked for.
      others: of a whole completion, the others that were asked for.
    """

    request_id: str
    text: str
    tokens: tuple[Token, ...]
    finish_reason: str | None
    prompt_tokens: int
    seed: int
    index: int = 0
    others: tuple[Completion, ...] = ()


@dataclasses.dataclass(frozen=True)
class Tls:
    """How to know the service, and to be known by it: PEM files.

    Attributes:
      ca: of who signed the service's certificate; None for those that the system trusts.
      certificate, key: of this client, where the service wants to see one.
    """

    ca: pathlib.Path | None = None
    certificate: pathlib.Path | None = None
    key: pathlib.Path | None = None

    def credentials(self) -> grpc.ChannelCredentials:
        """For a channel. Raises OSError if a file can't be read, ClientError if only one of certificate and key is given."""
        if (self.certificate is None) != (self.key is None):
            given = self.certificate or self.key
            raise ClientError(f"a client's certificate and its key belong together; only {given} is given")
        ca, certificate, key = (
            f.read_bytes() if f is not None else None for f in (self.ca, self.certificate, self.key)
        )
        return grpc.ssl_channel_credentials(ca, key, certificate)


class Options(TypedDict, total=False):
    """How to complete; see `grok/serving/v1/generation.proto` for what each means, and for what is assumed if it is absent."""

    max_tokens: int
    temperature: float
    top_p: float
    top_k: int
    seed: int
    logit_bias: Mapping[int, float]
    allowed_tokens: Sequence[int]
    stop: Sequence[str]
    ignore_eos: bool
    top_logprobs: int
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    json_schema: str
    regex: str
    choice: Sequence[str]
    n: int
    priority: int


def completion_request(prompt: str | Sequence[int], **options: Unpack[Options]) -> generation_pb2.Completion:
    """The request for a completion of a text or of tokens."""
    completion = generation_pb2.Completion(
        max_tokens=options.get("max_tokens"),
        sampling=generation_pb2.SamplingParams(
            temperature=options.get("temperature"),
            top_p=options.get("top_p"),
            top_k=options.get("top_k"),
            seed=options.get("seed"),
            logit_bias=options.get("logit_bias"),
            allowed_tokens=options.get("allowed_tokens"),
            min_p=options.get("min_p"),
            repetition_penalty=options.get("repetition_penalty"),
            presence_penalty=options.get("presence_penalty"),
            frequency_penalty=options.get("frequency_penalty"),
        ),
        stop=options.get("stop"),
        ignore_eos=options.get("ignore_eos", False),
        top_logprobs=options.get("top_logprobs", 0),
        n=options.get("n", 1),
        priority=options.get("priority", 0),
    )
    if "json_schema" in options:
        completion.json_schema = options["json_schema"]
    if "regex" in options:
        completion.regex = options["regex"]
    if "choice" in options:
        completion.choice.texts.extend(options["choice"])
    if isinstance(prompt, str):
        completion.text = prompt
    else:
        completion.tokens.CopyFrom(generation_pb2.TokenIds(ids=prompt))
    return completion


class Client:
    """A connection to a gateway. Methods block; any thread may call them."""

    def __init__(
        self,
        address: str = DEFAULT_ADDRESS,
        *,
        api_key: str | None = None,
        tls: Tls | None = None,
        attempts: int = 5,
    ) -> None:
        options = _options(address)
        self._channel = (
            grpc.insecure_channel(address, options)
            if tls is None
            else grpc.secure_channel(address, tls.credentials(), options)
        )
        self._metadata = _metadata(api_key)
        self._generation = generation_pb2_grpc.GenerationServiceStub(self._channel)
        self._cluster = cluster_pb2_grpc.ClusterServiceStub(self._channel)
        self._attempts = attempts

    def generate(
        self, prompt: str | Sequence[int], *, timeout: float | None = None, **options: Unpack[Options]
    ) -> Iterator[Completion]:
        """Streams a completion part by part. See Options. Closing it cancels the request."""
        stream = _Stream(completion_request(prompt, **options), self._attempts)
        while not stream.ended:
            call = self._generation.Generate(stream.request, timeout=timeout, metadata=self._metadata)
            try:
                for response in call:
                    yield stream.take(response)
                return
            except grpc.RpcError as error:
                pause = stream.pause(error)
            finally:
                call.cancel()
            time.sleep(pause)

    def complete(
        self, prompt: str | Sequence[int], *, timeout: float | None = None, **options: Unpack[Options]
    ) -> Completion:
        """A whole completion. See Options."""
        request = generation_pb2.GenerateOnceRequest(completion=completion_request(prompt, **options))
        return _part(self._retry(self._generation.GenerateOnce, request, timeout))

    def tokenize(self, text: str, *, timeout: float | None = None) -> list[int]:
        """The tokens of a text."""
        return list(self._retry(self._generation.Tokenize, generation_pb2.TokenizeRequest(text=text), timeout).ids)

    def detokenize(self, ids: Sequence[int], *, timeout: float | None = None) -> str:
        """The text of tokens."""
        request = generation_pb2.DetokenizeRequest(ids=ids)
        return self._retry(self._generation.Detokenize, request, timeout).text

    def count_tokens(self, text: str, *, timeout: float | None = None) -> int:
        """The number of tokens of a text."""
        request = generation_pb2.CountTokensRequest(text=text)
        return self._retry(self._generation.CountTokens, request, timeout).tokens

    def model(self, *, timeout: float | None = None) -> generation_pb2.GetModelResponse:
        """The served model."""
        return self._retry(self._generation.GetModel, generation_pb2.GetModelRequest(), timeout)

    def status(self, *, timeout: float | None = None) -> cluster_pb2.GetStatusResponse:
        """Replicas, hosts and load."""
        return self._retry(self._cluster.GetStatus, cluster_pb2.GetStatusRequest(), timeout)

    def serving(self, *, timeout: float | None = None) -> bool:
        """Whether any replica serves, by the gateway's health service, which wants no key."""
        stub: Any = health_pb2_grpc.HealthStub(self._channel)
        status = stub.Check(health_pb2.HealthCheckRequest(), timeout=timeout).status
        return bool(status == health_pb2.HealthCheckResponse.SERVING)

    def restart(self, replica: int, *, timeout: float | None = None) -> int:
        """Gives a replica new worker processes; returns the number of its mesh when it serves again."""
        request = cluster_pb2.RestartRequest(replica=replica)
        return self._cluster.Restart(request, timeout=timeout, metadata=self._metadata).epoch

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

    def _retry(
        self, method: grpc.UnaryUnaryMultiCallable[Request, Response], request: Request, timeout: float | None
    ) -> Response:
        for attempt in range(1, self._attempts):
            try:
                return method(request, timeout=timeout, metadata=self._metadata)
            except grpc.RpcError as error:
                pause = _pause(error, attempt)
                if pause is None:
                    raise
            time.sleep(pause)
        return method(request, timeout=timeout, metadata=self._metadata)


class AsyncClient:
    """As Client, for asyncio. Must be made inside a running event loop."""

    def __init__(
        self,
        address: str = DEFAULT_ADDRESS,
        *,
        api_key: str | None = None,
        tls: Tls | None = None,
        attempts: int = 5,
    ) -> None:
        options = _options(address)
        self._channel = (
            grpc.aio.insecure_channel(address, options)
            if tls is None
            else grpc.aio.secure_channel(address, tls.credentials(), options)
        )
        self._metadata = _metadata(api_key)
        self._generation = generation_pb2_grpc.GenerationServiceStub(self._channel)
        self._cluster = cluster_pb2_grpc.ClusterServiceStub(self._channel)
        self._attempts = attempts

    async def generate(
        self, prompt: str | Sequence[int], *, timeout: float | None = None, **options: Unpack[Options]
    ) -> AsyncIterator[Completion]:
        """As Client.generate."""
        stream = _Stream(completion_request(prompt, **options), self._attempts)
        while not stream.ended:
            call = self._generation.Generate(stream.request, timeout=timeout, metadata=self._metadata)
            try:
                async for response in call:
                    yield stream.take(response)
                return
            except grpc.RpcError as error:
                pause = stream.pause(error)
            finally:
                call.cancel()
            await asyncio.sleep(pause)

    async def complete(
        self, prompt: str | Sequence[int], *, timeout: float | None = None, **options: Unpack[Options]
    ) -> Completion:
        """As Client.complete."""
        request = generation_pb2.GenerateOnceRequest(completion=completion_request(prompt, **options))
        response = await self._retry(self._generation.GenerateOnce, request, timeout)
        return _part(response)

    async def tokenize(self, text: str, *, timeout: float | None = None) -> list[int]:
        """As Client.tokenize."""
        request = generation_pb2.TokenizeRequest(text=text)
        return list((await self._retry(self._generation.Tokenize, request, timeout)).ids)

    async def detokenize(self, ids: Sequence[int], *, timeout: float | None = None) -> str:
        """As Client.detokenize."""
        request = generation_pb2.DetokenizeRequest(ids=ids)
        return (await self._retry(self._generation.Detokenize, request, timeout)).text

    async def count_tokens(self, text: str, *, timeout: float | None = None) -> int:
        """As Client.count_tokens."""
        request = generation_pb2.CountTokensRequest(text=text)
        return (await self._retry(self._generation.CountTokens, request, timeout)).tokens

    async def model(self, *, timeout: float | None = None) -> generation_pb2.GetModelResponse:
        """As Client.model."""
        return await self._retry(self._generation.GetModel, generation_pb2.GetModelRequest(), timeout)

    async def status(self, *, timeout: float | None = None) -> cluster_pb2.GetStatusResponse:
        """As Client.status."""
        return await self._retry(self._cluster.GetStatus, cluster_pb2.GetStatusRequest(), timeout)

    async def close(self) -> None:
        """Ends the connection."""
        await self._channel.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def _retry(
        self, method: grpc.aio.UnaryUnaryMultiCallable[Request, Response], request: Request, timeout: float | None
    ) -> Response:
        for attempt in range(1, self._attempts):
            try:
                return await method(request, timeout=timeout, metadata=self._metadata)
            except grpc.RpcError as error:
                pause = _pause(error, attempt)
                if pause is None:
                    raise
            await asyncio.sleep(pause)
        return await method(request, timeout=timeout, metadata=self._metadata)


class _Stream:
    """A stream over as many calls as it takes: the request that asks for what is missing, and how long to wait with it."""

    def __init__(self, completion: generation_pb2.Completion, attempts: int) -> None:
        self.request = generation_pb2.GenerateRequest(completion=completion)
        self.ended = False
        self._attempts = attempts
        self._failed = 0

    def take(self, response: generation_pb2.GenerateResponse) -> Completion:
        """Notes what has come."""
        completion = self.request.completion
        completion.sampling.seed = response.seed
        completion.resume.ids.extend(token.id for token in response.tokens)
        self.ended = bool(response.finish_reason) and completion.n <= 1
        self._failed = 0
        return _part(response)

    def pause(self, error: Any) -> float:
        """Seconds to wait before the next call; 0 if nothing is missing. Raises the error if there is to be none."""
        if self.ended:
            return 0.0
        self._failed += 1
        pause = _pause(error, self._failed)
        several = self.request.completion.n > 1 and self.request.completion.resume.ids
        if pause is None or several or self._failed >= self._attempts:
            raise error
        return pause


def _options(address: str) -> list[tuple[str, Any]]:
    """How a channel is: answers may have any size; a proxy that the environment names is none for this machine itself."""
    host = address.rpartition(":")[0].removeprefix("dns:").lstrip("/").strip("[]")
    local = host in ("localhost", "::1") or host.startswith("127.") or address.startswith("unix:")
    options: list[tuple[str, Any]] = [("grpc.max_receive_message_length", -1)]
    return [*options, ("grpc.enable_http_proxy", 0)] if local else options


def _metadata(api_key: str | None) -> tuple[tuple[str, str], ...]:
    """The metadata that bring a key, which may end with a line end, as what is read from a file does. Raises ClientError."""
    key = (api_key or "").strip()
    if not all(" " < character <= "~" for character in key):
        raise ClientError("the API key has characters that no key has: it is made of letters, digits, '-' and '_'")
    return (("authorization", f"Bearer {key}"),) if key else ()


def _part(response: generation_pb2.GenerateResponse | generation_pb2.GenerateOnceResponse) -> Completion:
    reason = None
    if response.finish_reason:
        reason = generation_pb2.FinishReason.Name(response.finish_reason).removeprefix("FINISH_REASON_").lower()
    return Completion(
        request_id=response.request_id,
        text=response.text,
        tokens=tuple(
            Token(token.id, token.logprob, tuple((top.id, top.logprob) for top in token.top))
            for token in response.tokens
        ),
        finish_reason=reason,
        prompt_tokens=response.usage.prompt_tokens,
        seed=response.seed,
        index=getattr(response, "index", 0),
        others=tuple(_part(other) for other in getattr(response, "others", ())),
    )


def _pause(error: Any, attempt: int) -> float | None:
    """Seconds to wait before another attempt after an RpcError; None if there is to be none."""
    # A gateway that has just stopped cancels calls that reach it before the client hears of it. Who closes a channel here
    # asks no more.
    gone = error.code() is grpc.StatusCode.CANCELLED and _CLOSED not in (error.details() or "")
    if error.code() is not grpc.StatusCode.UNAVAILABLE and not gone:
        return None
    backoff: float = min(_LONGEST_PAUSE, _FIRST_PAUSE * 2**attempt) * _RANDOM.uniform(0.5, 1.0)
    return max(backoff, _asked_for(error))


def _asked_for(error: Any) -> float:
    """The pause that the error's RetryInfo asks for, in seconds."""
    status = rpc_status.from_call(error)
    for detail in status.details if status else ():
        info = error_details_pb2.RetryInfo()
        if detail.Unpack(info):
            return info.retry_delay.ToMilliseconds() / 1000
    return 0.0
