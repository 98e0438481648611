"""The public GenerationService."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any

import grpc.aio
from opentelemetry import trace

from cluster.gateway.admission import Admission
from cluster.gateway.call import CURRENT, Call
from cluster.gateway.errors import Violation, code_name, invalid
from cluster.gateway.latency import RecentLatency
from cluster.gateway.router import Router
from cluster.gateway.session import Delta, Session
from cluster.gateway.validation import Limits, to_request
from cluster.telemetry import metrics, traces
from grok.serving.v1 import generation_pb2, generation_pb2_grpc
from workers.engine.plan import Token
from workers.engine.request import Request
from workers.tokenizer import Tokenizer

#: Seconds that a client may leave a part of its stream unread.
UNREAD_SECONDS = 60.0


class GenerationService(generation_pb2_grpc.GenerationServiceServicer):
    """Completes prompts on the replicas that the router knows. Raises GatewayError; `interceptor` makes it a status."""

    def __init__(
        self,
        limits: Limits,
        tokenizer: Tokenizer,
        router: Router,
        admission: Admission,
        latency: RecentLatency,
        model: generation_pb2.GetModelResponse,
        tracer: trace.Tracer,
        log_prompts: bool,
    ) -> None:
        self._limits = limits
        self._tokenizer = tokenizer
        self._router = router
        self._admission = admission
        self._latency = latency
        self._model = model
        self._tracer = tracer
        self._log_prompts = log_prompts

    async def Generate(
        self, request: generation_pb2.GenerateRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> AsyncIterator[generation_pb2.GenerateResponse]:
        """Streams completions: parts of one in order, those of several as they come."""
        completion = request.completion
        with self._sessions(completion, context) as sessions:
            if len(sessions) == 1:
                while sessions[0].finish is None:
                    part = _part(sessions[0], await sessions[0].next_deltas(), completion, 0)
                    with _must_be_read():
                        yield part
                return
            waiting = {asyncio.ensure_future(session.next_deltas()): i for i, session in enumerate(sessions)}
            try:
                while waiting:
                    done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
                    for task in done:
                        i = waiting.pop(task)
                        with _must_be_read():
                            yield _part(sessions[i], task.result(), completion, i)
                        if sessions[i].finish is None:
                            waiting[asyncio.ensure_future(sessions[i].next_deltas())] = i
            finally:
                for task in waiting:
                    task.cancel()

    async def GenerateOnce(
        self, request: generation_pb2.GenerateOnceRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> generation_pb2.GenerateOnceResponse:
        """Returns whole completions."""
        completion = request.completion
        with self._sessions(completion, context) as sessions:
            responses = []
            for session in sessions:
                deltas: list[Delta] = []
                while session.finish is None:
                    deltas += await session.next_deltas()
                responses.append(
                    generation_pb2.GenerateOnceResponse(
                        request_id=session.request.id,
                        text="".join(delta.text for delta in deltas),
                        tokens=[_token(delta.token, completion.top_logprobs) for delta in deltas],
                        finish_reason=session.finish or generation_pb2.FINISH_REASON_UNSPECIFIED,
                        usage=_usage(session),
                        seed=session.request.sampling.seed,
                    )
                )
            responses[0].others.extend(responses[1:])
            return responses[0]

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
    def _sessions(
        self, completion: generation_pb2.Completion, context: grpc.aio.ServicerContext[Any, Any]
    ) -> Iterator[list[Session]]:
        """A session for each of the completions that are asked for; see `_session`."""
        caller, left = CURRENT.get().caller, context.time_remaining()
        # Before the work that an answer would take: many are turned away when there is no time for it.
        self._admission.check(caller)
        if completion.priority > caller.max_priority:
            problem = f"is {completion.priority}; this key may ask for at most {caller.max_priority}"
            raise invalid([Violation("completion.priority", problem)])
        wait = self._router.wait(completion.priority)
        self._admission.patience(wait, left)
        request = to_request(completion, self._limits, self._tokenizer, CURRENT.get().request_id)
        self._admission.patience(wait, left, self._router.forecast.own(request))
        with contextlib.ExitStack() as stack:
            sessions = []
            for i in range(max(1, completion.n)):
                sampling = dataclasses.replace(request.sampling, seed=(request.sampling.seed + i) % 2**64)
                name = f"{request.id}-{i}" if i else request.id
                one = dataclasses.replace(request, id=name, sampling=sampling, owner=caller.name)
                sessions.append(stack.enter_context(self._session(one, completion, context)))
            yield sessions

    @contextlib.contextmanager
    def _session(
        self, request: Request, completion: generation_pb2.Completion, context: grpc.aio.ServicerContext[Any, Any]
    ) -> Iterator[Session]:
        """An admitted session, sent to a replica; however the block ends, the replica forgets it and times are counted."""
        call = CURRENT.get()
        with self._admission.admitted(call.caller):
            session = Session(request, tuple(completion.stop), self._tokenizer)
            self._router.start(session)
            error: BaseException | None = None
            try:
                yield session
            except BaseException as raised:
                error = raised
                raise
            finally:
                self._router.cancel(session)
                call.replica, call.epoch = session.replica, session.epoch
                self._tell(call, session, code_name(error, context.time_remaining()))

    def _tell(self, call: Call, session: Session, code: str) -> None:
        """Counts, traces and notes for the log what became of a session that ended with `code`."""
        ended, count, prompt = time.monotonic(), len(session.tokens), session.request.prompt
        labels = ("text_completion", self._model.name)
        cancelled = code in ("CANCELLED", "DEADLINE_EXCEEDED")
        reason = _reason(session) if session.finish else "cancelled" if cancelled else "error"
        metrics.COMPLETIONS.labels(call.caller.name, reason).inc()
        metrics.TOKENS.labels(call.caller.name, "prompt").inc(len(prompt))
        metrics.TOKENS.labels(call.caller.name, "completion").inc(count)
        self._admission.used(call.caller, len(prompt) + count)
        metrics.PROMPT_LENGTH.observe(len(prompt))
        metrics.COMPLETION_LENGTH.observe(count)
        metrics.REQUEST_DURATION.labels(*labels, "" if code == "OK" else code).observe(ended - call.began)
        call.details.update(prompt_tokens=len(prompt), completion_tokens=count, finish_reason=reason)
        if self._log_prompts:
            call.details["prompt"] = self._tokenizer.decode(prompt)
            call.details["completion"] = self._tokenizer.decode([token.id for token in session.tokens])
        if session.first_token is None:
            return
        if session.timing is not None and session.arrivals is not None and not session.moved:
            # As tokens came, not as the client took them.
            seconds = session.arrivals[1] - session.arrivals[0] + session.timing.prefill
            drawn = session.drawn - len(session.request.resumed)
            self._router.forecast.learn(session.request, drawn, seconds, whole=session.finish is not None)
        to_first = session.first_token - call.began
        self._latency.add(to_first)
        metrics.TIME_TO_FIRST_TOKEN.labels(*labels).observe(to_first)
        if count > 1:
            metrics.TIME_PER_OUTPUT_TOKEN.labels(*labels).observe((ended - session.first_token) / (count - 1))
        call.details["time_to_first_token"] = round(to_first, 4)
        if session.timing is not None:
            slot = session.first_token - session.timing.prefill
            traces.child(self._tracer, call.span, "queue", slot - session.timing.queue, slot)
            traces.child(self._tracer, call.span, "prefill", slot, session.first_token)
            traces.child(self._tracer, call.span, "decode", session.first_token, ended)


@contextlib.contextmanager
def _must_be_read() -> Iterator[None]:
    """Cancels the current task, which sends a part to a client, if the client does not take it for too long: its tokens
    would be kept, and its place be held, as long as it pleases."""
    task = asyncio.current_task()
    assert task is not None
    timer = asyncio.get_running_loop().call_later(UNREAD_SECONDS, task.cancel)
    try:
        yield
    finally:
        timer.cancel()


def _reason(session: Session) -> str:
    name: str = generation_pb2.FinishReason.Name(session.finish or generation_pb2.FINISH_REASON_UNSPECIFIED)
    return name.removeprefix("FINISH_REASON_").lower()


def _part(
    session: Session, deltas: list[Delta], completion: generation_pb2.Completion, index: int
) -> generation_pb2.GenerateResponse:
    return generation_pb2.GenerateResponse(
        request_id=session.request.id,
        text="".join(delta.text for delta in deltas),
        tokens=[_token(delta.token, completion.top_logprobs) for delta in deltas],
        finish_reason=session.finish or generation_pb2.FINISH_REASON_UNSPECIFIED,
        usage=_usage(session) if session.finish is not None else None,
        seed=session.request.sampling.seed,
        index=index,
    )


def _token(token: Token, alternatives: int) -> generation_pb2.GeneratedToken:
    top = [generation_pb2.TokenLogprob(id=id, logprob=logprob) for id, logprob in token.top[:alternatives]]
    return generation_pb2.GeneratedToken(id=token.id, logprob=token.logprob, top=top)


def _usage(session: Session) -> generation_pb2.Usage:
    count = len(session.request.resumed) + len(session.tokens)
    return generation_pb2.Usage(prompt_tokens=len(session.request.prompt), completion_tokens=count)
