"""What is fuzzed: from bytes that anybody may send or leave on a disk to the errors that they may cause, and no others."""

from __future__ import annotations

import asyncio
import io
import pathlib
import re
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import yaml
from google.protobuf.message import DecodeError, Message

from cluster.config.reader import load_config
from cluster.config.schema import ConfigError
from cluster.gateway.auth.api_keys import ANONYMOUS, Keys, KeysError
from cluster.gateway.errors import GatewayError
from cluster.gateway.session import Session
from cluster.gateway.stop import StopTexts
from cluster.gateway.validation import Limits, to_request
from grok.serving.v1 import cluster_pb2, generation_pb2
from grokmesh import completion_request
from tests.conftest import DEMO, GOLDEN
from tests.fuzz.http_requests import Connections, requests
from tests.support.constraints import LocalConstraint
from tests.support.fake_service import MODEL, TOKENIZER, InlineTexts, now
from workers.checkpoint.errors import CheckpointError
from workers.checkpoint.tensor_file import read_header
from workers.engine.scheduler import Scheduler
from workers.host.streams import Link, LinkError
from workers.messages.codec import CodecError, decode, encode
from workers.messages.frames import Done, Hello, LeaderInput, LeaderOutput, PlanFrame
from workers.messages.plan import EngineShape, Plan
from workers.messages.request import Refused, Request
from workers.model.config import ConfigError as ModelConfigError
from workers.model.config import GrokConfig
from workers.text.grammar import GrammarError, Grammars

CORPUS = pathlib.Path(__file__).parent / "corpus"
_FOLDER = pathlib.Path(tempfile.mkdtemp(prefix="fuzz"))

_LIMITS = Limits(MODEL, 512, TOKENIZER.longest_piece)
_TEXTS = InlineTexts()
_GRAMMARS = Grammars(TOKENIZER, MODEL.vocab_size, MODEL.eos_token)
_CONNECTIONS = Connections()
_SHAPE = EngineShape(slots=2, groups=1, pages=64, page_size=16, chunk=64, context=512, batch_invariant=True)
_REQUESTS: tuple[type[Message], ...] = (
    generation_pb2.GenerateRequest, generation_pb2.GenerateOnceRequest, generation_pb2.TokenizeRequest,
    generation_pb2.DetokenizeRequest, generation_pb2.CountTokensRequest, cluster_pb2.ProfileRequest,
)  # fmt: skip


def gateway(data: bytes) -> None:
    """A client's message, the first byte of which says to which method: what it asks for comes as far as a first plan, or is
    refused."""
    if not data:
        return
    try:
        message = _REQUESTS[data[0] % len(_REQUESTS)].FromString(data[1:])
    except DecodeError:
        return
    if isinstance(message, (generation_pb2.TokenizeRequest, generation_pb2.CountTokensRequest)):
        ids = TOKENIZER.encode(message.text)
        assert all(0 <= id < MODEL.vocab_size for id in ids)
        TOKENIZER.decode(ids)
    elif isinstance(message, (generation_pb2.GenerateRequest, generation_pb2.GenerateOnceRequest)):
        _complete(message.completion)


def _complete(completion: generation_pb2.Completion) -> None:
    try:
        request = _request(completion)
        session = Session(request, StopTexts.of(completion.stop), TOKENIZER)
        asyncio.run(session.catch_up())
    except GatewayError as error:
        error.status()
        return
    received = decode(Request, encode(session.rest()))
    scheduler = Scheduler(_SHAPE, MODEL.vocab_size, 1)
    try:
        scheduler.submit(received, _constraint(received))
    except Refused:
        assert received.resumed
        return
    plan = scheduler.plan()
    if plan is None:  # tokens to resume after that the grammar does not allow
        assert received.resumed
        assert scheduler.failures()
        return
    assert decode(Plan, encode(plan)) == plan


def _request(completion: generation_pb2.Completion) -> Request:
    return now(to_request(completion, _LIMITS, _TEXTS, ANONYMOUS, "r", whole=False))


def _constraint(request: Request) -> LocalConstraint | None:
    return LocalConstraint(_GRAMMARS, request) if request.grammar else None


def checkpoint(data: bytes) -> None:
    """A tensor file."""
    path = _FOLDER / "tensor00000_000"
    path.write_bytes(data)
    try:
        file = read_header(path)
    except CheckpointError:
        return
    for span in (file.values, file.scales):
        if span is not None:
            file.map(span).tobytes()


def config(data: bytes) -> None:
    """A ray_config.yaml, a file of keys and a model's config.json."""
    path = _FOLDER / "ray_config.yaml"
    path.write_bytes(data)
    for read, error in ((load_config, ConfigError), (Keys, KeysError), (GrokConfig.load, ModelConfigError)):
        try:
            read(path)
        except error:
            continue


def streams(data: bytes) -> None:
    """What comes on an internal stream, from a follower, a gateway or a leader: frames, or an end with an error."""
    connection: Any = _Received(data)
    link = Link(connection)
    try:
        while (frame := link.receive()) is not None:
            _hear(frame)
    except LinkError:
        return


class _Received:
    """A connection on which bytes have come, and then no more."""

    def __init__(self, data: bytes) -> None:
        self._data = io.BytesIO(data)

    def setsockopt(self, *_: int) -> None:
        """Nothing to set."""

    def recv(self, count: int) -> bytes:
        """The next bytes."""
        return self._data.read(count)


def http(data: bytes) -> None:
    """What a connection of the HTTP interface carries. A body that has changed is as long as its head says."""
    head, end, body = data.partition(b"\r\n\r\n")
    head = re.sub(rb"content-length: \d+", b"content-length: %d" % len(body), head, count=1)
    written = _CONNECTIONS.answers(head + end + body)
    assert not re.search(rb"^HTTP/1.1 5(?!03)", written, re.MULTILINE), written


def _hear(frame: bytes) -> None:
    for kind in (Hello, Done, LeaderInput, LeaderOutput, PlanFrame):
        try:
            message = decode(kind, frame)
        except CodecError:
            continue
        if isinstance(message, LeaderInput) and message.submit is not None:
            _submit(message.submit)


def _submit(request: Request) -> None:
    """As the leader does it."""
    scheduler = Scheduler(_SHAPE, MODEL.vocab_size, 1)
    try:
        scheduler.submit(request, _constraint(request))
    except (Refused, GrammarError):
        return
    scheduler.plan()


def seeds(target: str) -> Iterator[bytes]:
    """Inputs from which a target's others are made."""
    yield from (path.read_bytes() for path in sorted((CORPUS / target).glob("*")))
    if target == "gateway":
        for options in (
            {"max_tokens": 5, "temperature": 0.5, "top_p": 0.9, "seed": 7, "stop": ["a", "bc"], "logit_bias": {5: 1.0}},
            {"regex": "[a-z]+", "n": 3}, {"json_schema": '{"type": "integer"}'}, {"choice": ["yes", "no"]},
            {"allowed_tokens": [4, 5], "repetition_penalty": 1.1, "priority": -3, "top_logprobs": 2, "min_p": 0.1},
        ):  # fmt: skip
            completion = completion_request("In the beginning", **options)
            yield b"\0" + generation_pb2.GenerateRequest(completion=completion).SerializeToString()
            completion.sampling.seed = 1
            completion.resume.ids.extend([5, 6])
            yield b"\1" + generation_pb2.GenerateOnceRequest(completion=completion).SerializeToString()
        yield b"\2" + generation_pb2.TokenizeRequest(text="In the beginning").SerializeToString()
    elif target == "checkpoint":
        files = sorted((GOLDEN / "nano-s1" / "ckpt-0").iterdir(), key=lambda path: path.stat().st_size)
        yield from (path.read_bytes() for path in (files[0], files[1], *files[6:9]))
    elif target == "http":
        yield from requests()
    elif target == "config":
        for path in ("ray_config.yaml", "deploy/ray_config.yaml", "models/demo/config.json"):
            yield (DEMO.parent.parent / path).read_bytes()
        yield yaml.safe_dump({"alice": {"sha256": "a" * 64, "scopes": ["generate"], "max_requests": 3}}).encode()
    else:
        for completion in (completion_request("In the beginning", max_tokens=5), completion_request([5, 6], regex="a")):
            request = _request(completion)
            yield _framed(LeaderInput(submit=request))
        yield _framed(Hello(3, b"s" * 32, 1)) + _framed(Done(4))


def _framed(message: object) -> bytes:
    frame = encode(message)
    return len(frame).to_bytes(4, "big") + frame


TARGETS: dict[str, Callable[[bytes], None]] = {
    "gateway": gateway,
    "checkpoint": checkpoint,
    "config": config,
    "streams": streams,
    "http": http,
}
