"""A gateway before a mesh that computes nothing, in a process of its own; and work on texts without other processes."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import multiprocessing
import pathlib
import unittest.mock
from collections.abc import Coroutine, Iterator
from typing import Any, TypeVar

from opentelemetry import trace

from cluster.config.schema import Config, GatewaySection
from cluster.controller.view import ReplicaView, ServiceView
from cluster.gateway.admission.latency import RecentLatency
from cluster.gateway.auth.api_keys import Caller, Keys
from cluster.gateway.openai.chat_template import ChatTemplate
from cluster.gateway.routing.router import Router
from cluster.gateway.server import Gateway
from cluster.gateway.text_job import TextJobs
from cluster.gateway.texts import TEXT_BUDGET, Done, Texts
from cluster.gateway.validation import Limits
from cluster.leader_stream import LeaderAddress
from grok.serving.v1 import cluster_pb2
from grokmesh import Client
from tests.conftest import DEMO
from tests.support.fake_mesh import leading
from tests.support.ports import free_port
from tests.support.waiting import wait_until
from workers.messages.plan import EngineShape
from workers.messages.specs import ModelSpec
from workers.model.config import GrokConfig
from workers.text.sandbox import Budget, Sandbox
from workers.text.tokenizer import Tokenizer

SHAPE = EngineShape(slots=16, groups=1, pages=513, page_size=16, chunk=64, context=512, batch_invariant=True)
MODEL = GrokConfig.load(DEMO / "config.json")
TOKENIZER = Tokenizer(DEMO / "tokenizer.model")
ARGUMENTS = [str(DEMO), str(MODEL.vocab_size), str(MODEL.eos_token)]

CHAT_TEMPLATE = """{%- for tool in tools or [] %}TOOL {{ tool.function.name }}
{% endfor %}{% for message in messages %}{{ message.role | upper }}: {{ message.content }}
{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"""
Result = TypeVar("Result")


@functools.cache
def _text_jobs() -> TextJobs:
    return TextJobs(TOKENIZER, MODEL.vocab_size, MODEL.eos_token)


class InlineTexts(Texts):
    """Does all work at once."""

    def __init__(self) -> None:
        unused: Any = None
        super().__init__(TOKENIZER, unused, lambda caller, tokens: None)
        self._jobs = _text_jobs()

    async def encode(self, text: str, caller: Caller) -> list[int]:
        """The tokens of a text."""
        return TOKENIZER.encode(text)

    async def run(self, job: str, data: bytes, caller: Caller, budget: Budget = TEXT_BUDGET) -> Done:
        """The job's outcome."""
        return Done.parse(self._jobs.run(job, data))


def now(work: Coroutine[Any, Any, Result]) -> Result:
    """What work comes to that waits for nothing."""
    try:
        work.send(None)
    except StopIteration as end:
        result: Result = end.value
        return result
    raise AssertionError("it waits")


async def _serve(
    address: str, http_address: str | None, seconds: float, keys: pathlib.Path | None, context: int
) -> None:
    limits = Limits(MODEL, context, TOKENIZER.longest_piece)
    config = Config(ModelSpec("demo", str(DEMO)), gateway=GatewaySection(address, http_address))
    template = ChatTemplate(CHAT_TEMPLATE, "test", "[EOS]")
    ready = asyncio.Event()
    router = Router(max_wait=0, on_change=lambda count: ready.set() if count else None)
    status: Any = unittest.mock.Mock()  # nobody asks for it
    sandbox = Sandbox("cluster.gateway.text_job", ARGUMENTS)
    gateway = Gateway(
        config, Keys(keys), limits, TOKENIZER, template, sandbox, router, RecentLatency(), status, trace.NoOpTracer()
    )
    await gateway.start()
    pages = SHAPE.slots * -(-context // SHAPE.page_size) + 1
    shape = EngineShape(SHAPE.slots, 1, pages, SHAPE.page_size, SHAPE.chunk, context, batch_invariant=True)
    with leading(shape, MODEL.vocab_size, 512, seconds, Sandbox("workers.text.grammar_job", ARGUMENTS)) as leader:
        replica = ReplicaView(0, cluster_pb2.REPLICA_STATE_READY, 1, LeaderAddress(0, 1, leader, b"s"))
        router.follow(ServiceView((replica,), 1))
        await ready.wait()
        await gateway.set_ready(True)
        await asyncio.Event().wait()


def _run(*arguments: Any) -> None:
    asyncio.run(_serve(*arguments))


@contextlib.contextmanager
def serving(
    seconds: float = 0.0,
    keys: pathlib.Path | None = None,
    context: int = SHAPE.context,
    http_address: str | None = None,
) -> Iterator[tuple[str, int]]:
    """Address and process of gateway and leader on a mesh that computes nothing in steps of `seconds`, for the block."""
    address = f"127.0.0.1:{free_port('127.0.0.1')}"
    process = multiprocessing.get_context("spawn").Process(
        target=_run, args=(address, http_address, seconds, keys, context), daemon=True
    )
    process.start()
    assert process.pid is not None
    try:
        with Client(address) as client:

            def ready() -> bool:
                with contextlib.suppress(Exception):
                    return client.serving(timeout=5)
                return False

            wait_until(ready, 60)
        yield address, process.pid
    finally:
        process.kill()
        process.join()
