"""The public GenerationService."""

from __future__ import annotations

import contextlib
import secrets
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any

import grpc.aio

from cluster.gateway.admission import Admission
from cluster.gateway.errors import Violation, invalid
from cluster.gateway.router import Router
from cluster.gateway.session import Delta, Session
from cluster.gateway.validation import Limits, to_request
from cluster.telemetry import metrics
from grok.serving.v1 import generation_pb2, generation_pb2_grpc
from workers.engine.plan import Token
from workers.tokenizer import Tokenizer


class GenerationService(generation_pb2_grpc.GenerationServiceServicer):
    """Completes prompts on the replicas that the router knows. Raises GatewayError; `interceptor` makes it a status."""

    def __init__(
        self,
        limits: Limits,
        tokenizer: Tokenizer,
        router: Router,
        admission: Admission,
        model: generation_pb2.GetModelResponse,
    ) -> None:
        self._limits = limits
        self._tokenizer = tokenizer
        self._router = router
        self._admission = admission
        self._model = model

    async def Generate(
        self, request: generation_pb2.GenerateRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> AsyncIterator[generation_pb2.GenerateResponse]:
        """Streams a completion."""
        completion = request.completion
        with self._session(completion) as session:
            finished = False
            while not finished:
                deltas = await session.next_deltas()
                finished = deltas[-1].finish is not None
                yield generation_pb2.GenerateResponse(
                    request_id=session.request.id,
                    text="".join(delta.text for delta in deltas),
                    tokens=[_token(delta.token, completion.top_logprobs) for delta in deltas],
                    finish_reason=deltas[-1].finish or generation_pb2.FINISH_REASON_UNSPECIFIED,
                    usage=_usage(session) if finished else None,
                    seed=session.request.sampling.seed,
                )

    async def GenerateOnce(
        self, request: generation_pb2.GenerateOnceRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> generation_pb2.GenerateOnceResponse:
        """Returns a whole completion."""
        completion = request.completion
        with self._session(completion) as session:
            deltas: list[Delta] = []
            while not deltas or deltas[-1].finish is None:
                deltas += await session.next_deltas()
            return generation_pb2.GenerateOnceResponse(
                request_id=session.request.id,
                text="".join(delta.text for delta in deltas),
                tokens=[_token(delta.token, completion.top_logprobs) for delta in deltas],
                finish_reason=deltas[-1].finish or generation_pb2.FINISH_REASON_UNSPECIFIED,
                usage=_usage(session),
                seed=session.request.sampling.seed,
            )

    async def Tokenize(
        self, request: generation_pb2.TokenizeRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> generation_pb2.TokenizeResponse:
        """Tokens of a text."""
        ids = self._tokenizer.encode(request.text)
        return generation_pb2.TokenizeResponse(ids=ids, pieces=[self._tokenizer.piece(id) for id in ids])

    async def Detokenize(
        self, request: generation_pb2.DetokenizeRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> generation_pb2.DetokenizeResponse:
        """Text of tokens."""
        vocab_size = self._limits.model.vocab_size
        outside = [id for id in request.ids if id >= vocab_size]
        if outside:
            raise invalid([Violation("ids", f"has token {outside[0]}; the vocabulary has {vocab_size}")])
        return generation_pb2.DetokenizeResponse(text=self._tokenizer.decode(request.ids))

    async def CountTokens(
        self, request: generation_pb2.CountTokensRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> generation_pb2.CountTokensResponse:
        """Number of tokens of a text."""
        return generation_pb2.CountTokensResponse(tokens=len(self._tokenizer.encode(request.text)))

    async def GetModel(
        self, request: generation_pb2.GetModelRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> generation_pb2.GetModelResponse:
        """The served model."""
        return self._model

    @contextlib.contextmanager
    def _session(self, completion: generation_pb2.Completion) -> Iterator[Session]:
        """An admitted session, sent to a replica; however the block ends, the replica forgets it and times are counted."""
        with self._admission.admitted():
            request = to_request(completion, self._limits, self._tokenizer, f"r-{secrets.token_hex(8)}")
            session = Session(request, tuple(completion.stop), self._tokenizer)
            link = self._router.start(session)
            metrics.PROMPT_TOKENS.inc(len(request.prompt))
            try:
                yield session
            finally:
                link.cancel(session)
                _observe(session)


def _observe(session: Session) -> None:
    ended, count = time.monotonic(), len(session.tokens)
    metrics.COMPLETION_TOKENS.inc(count)
    metrics.REQUEST_DURATION.observe(ended - session.began)
    if session.first_token is not None:
        metrics.TIME_TO_FIRST_TOKEN.observe(session.first_token - session.began)
        if count > 1:
            metrics.TIME_PER_OUTPUT_TOKEN.observe((ended - session.first_token) / (count - 1))


def _token(token: Token, alternatives: int) -> generation_pb2.GeneratedToken:
    top = [generation_pb2.TokenLogprob(id=id, logprob=logprob) for id, logprob in token.top[:alternatives]]
    return generation_pb2.GeneratedToken(id=token.id, logprob=token.logprob, top=top)


def _usage(session: Session) -> generation_pb2.Usage:
    return generation_pb2.Usage(prompt_tokens=len(session.request.prompt), completion_tokens=len(session.tokens))
