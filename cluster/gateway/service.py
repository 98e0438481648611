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

from cluster.gateway.admission.admission import Admission
from cluster.gateway.admission.latency import RecentLatency
from cluster.gateway.auth.api_keys import MAX_PRIORITY
from cluster.gateway.call import CURRENT, Call, begin_part
from cluster.gateway.errors import Violation, code_name, invalid
from cluster.gateway.routing.router import Router
from cluster.gateway.scoring import scored_tokens, to_completions
from cluster.gateway.session import Delta, Session
from cluster.gateway.stop import StopTexts
from cluster.gateway.text_job import count, detokenize, tokenize
from cluster.gateway.texts import Texts
from cluster.gateway.validation import Limits, to_request
from cluster.telemetry import metrics, traces
from cluster.together import together
from grok.serving.v1 import generation_pb2, generation_pb2_grpc
from workers.messages.frames import Status
from workers.messages.plan import Token
from workers.messages.request import Load

#: Continuations of a context that are scored at the same time.
SCORED_TOGETHER = 8
#: How calls end that nobody waits for any more.
_GIVEN_UP = ("CANCELLED", "DEADLINE_EXCEEDED", "ABORTED")
#: Seconds that a client may leave a part of its stream unread.
UNREAD_SECONDS = 60.0


class GenerationService(generation_pb2_grpc.GenerationServiceServicer):
    """Completes prompts on the replicas that the router knows. Raises GatewayError; `interceptor` makes it a status."""

    def __init__(
        self,
        limits: Limits,
        texts: Texts,
        router: Router,
        admission: Admission,
        latency: RecentLatency,
        model: generation_pb2.GetModelResponse,
        tracer: trace.Tracer,
        log_prompts: bool,
    ) -> None:
        self._limits = limits
        self._texts = texts
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
        async with self._sessions(completion, context, whole=False) as sessions, Reading() as reading:
            if len(sessions) == 1:
                while sessions[0].finish is None:
                    part = _part(sessions[0], await sessions[0].next_deltas(), 0, counted=completion.usage_in_parts)
                    with reading:
                        yield part
                return
            waiting = {asyncio.ensure_future(session.next_deltas()): i for i, session in enumerate(sessions)}
            try:
                while waiting:
                    done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
                    for task in done:
                        i = waiting.pop(task)
                        with reading:
                            yield _part(sessions[i], task.result(), i, counted=completion.usage_in_parts)
                        if sessions[i].finish is None:
                            waiting[asyncio.ensure_future(sessions[i].next_deltas())] = i
            finally:
                for task in waiting:
                    task.cancel()

    async def GenerateOnce(
        self, request: generation_pb2.GenerateOnceRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> generation_pb2.GenerateOnceResponse:
        completion = request.completion
        async with self._sessions(completion, context, whole=True) as sessions:
            responses = await together(_whole(session) for session in sessions)
            responses[0].others.extend(responses[1:])
            return responses[0]

    async def Score(
        self, request: generation_pb2.ScoreRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> generation_pb2.ScoreResponse:
        call, places = CURRENT.get(), asyncio.Semaphore(SCORED_TOGETHER)
        completions = await self._scored(request.scoring, whole=True)

        async def one(index: int, completion: generation_pb2.Completion) -> generation_pb2.ScoredText:
            async with places:
                begin_part(index)
                async with self._sessions(completion, context, whole=True, within="scoring.") as (session,):
                    text = generation_pb2.ScoredText()
                    while session.finish is None:
                        text.MergeFrom(_scored_text(session, await session.next_deltas(), completion.score_from))
                        await asyncio.sleep(0)  # others' turn
                    return text

        texts = await together(one(i, completion) for i, completion in enumerate(completions))
        return generation_pb2.ScoreResponse(request_id=call.request_id, texts=texts)

    async def ScoreStream(
        self, request: generation_pb2.ScoreStreamRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> AsyncIterator[generation_pb2.ScoreStreamResponse]:
        """Scores texts one after the other, and streams what comes."""
        name = CURRENT.get().request_id
        for index, completion in enumerate(await self._scored(request.scoring, whole=False)):
            begin_part(index)
            first = completion.score_from
            sessions = self._sessions(completion, context, whole=False, within="scoring.")
            async with sessions as (session,), Reading() as reading:
                while session.finish is None:
                    text = _scored_text(session, await session.next_deltas(), first)
                    first += len(text.tokens)
                    with reading:
                        yield generation_pb2.ScoreStreamResponse(request_id=name, index=index, text=text)

    async def _scored(self, scoring: generation_pb2.Scoring, *, whole: bool) -> list[generation_pb2.Completion]:
        caller = CURRENT.get().caller
        with self._admission.admitted(caller):
            return await to_completions(scoring, self._limits, self._texts, caller, whole=whole)

    async def Tokenize(
        self, request: generation_pb2.TokenizeRequest | bytes, context: grpc.aio.ServicerContext[Any, Any]
    ) -> Any:
        """Tokens of a text. A large request comes, and its answer goes, as it travels."""
        if isinstance(request, bytes):
            return await self._aside("Tokenize", "text", request)
        return tokenize(request, self._texts.tokenizer)

    async def Detokenize(
        self, request: generation_pb2.DetokenizeRequest | bytes, context: grpc.aio.ServicerContext[Any, Any]
    ) -> Any:
        """Text of tokens; see Tokenize."""
        if isinstance(request, bytes):
            return await self._aside("Detokenize", "ids", request)
        try:
            return detokenize(request, self._texts.tokenizer, self._limits.model.vocab_size)
        except ValueError as error:
            raise invalid([Violation("ids", str(error))]) from error

    async def CountTokens(
        self, request: generation_pb2.CountTokensRequest | bytes, context: grpc.aio.ServicerContext[Any, Any]
    ) -> Any:
        """Number of tokens of a text; see Tokenize."""
        if isinstance(request, bytes):
            return await self._aside("CountTokens", "text", request)
        return count(request, self._texts.tokenizer)

    async def _aside(self, method: str, field: str, request: bytes) -> bytes:
        """The answer to a large request about texts, both as they travel."""
        caller = CURRENT.get().caller
        with self._admission.admitted(caller):
            done = await self._texts.run(method, request, caller)
        if done.problem:
            raise invalid([Violation(field, done.problem)])
        return done.answer

    async def GetModel(
        self, request: generation_pb2.GetModelRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> generation_pb2.GetModelResponse:
        return self._model

    async def Cancel(
        self, request: generation_pb2.CancelRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> generation_pb2.CancelResponse:
        if not request.request_id:
            raise invalid([Violation("request_id", "is missing")])
        self._router.abort(request.request_id)
        return generation_pb2.CancelResponse()

    async def GetLoad(
        self, request: generation_pb2.GetLoadRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> generation_pb2.GetLoadResponse:
        def one(index: int, load: Load, status: Status) -> generation_pb2.ReplicaLoad:
            names = ("slots", "running", "waiting", "pages_used", "pages_total")
            counts = zip(*(group.expert_tokens for group in status.layer_groups), strict=True)
            numbers: dict[str, Any] = {name: getattr(load, name) for name in names}
            return generation_pb2.ReplicaLoad(replica=index, **numbers, expert_tokens=map(sum, counts))

        return generation_pb2.GetLoadResponse(replicas=[one(*load) for load in self._router.loads])

    @contextlib.asynccontextmanager
    async def _sessions(
        self,
        completion: generation_pb2.Completion,
        context: grpc.aio.ServicerContext[Any, Any],
        *,
        whole: bool,
        within: str = "completion.",
    ) -> AsyncIterator[list[Session]]:
        """A session for each of the completions that are asked for; see `_started`. With `whole` they are answered at once.
        `within` stands before the names of fields that are wrong."""
        call, left = CURRENT.get(), context.time_remaining()
        caller, number = call.caller, max(1, completion.n)
        # Places are taken before any work, so that the limits of a key bound that too.
        with self._admission.admitted(caller, number):
            wait = self._router.wait(max(-MAX_PRIORITY, min(completion.priority, MAX_PRIORITY)))
            self._admission.check_wait(wait, left)
            request = await to_request(
                completion, self._limits, self._texts, caller, call.request_id, whole=whole, within=within
            )
            self._admission.check_wait(wait, left, self._router.forecast.own(request))
            stops = StopTexts.of(completion.stop, shown=completion.include_stop_text)
            with contextlib.ExitStack() as stack:
                sessions = []
                for i in range(number):
                    sampling = dataclasses.replace(request.sampling, seed=(request.sampling.seed + i) % 2**64)
                    name = f"{request.id}-{i}" if i else request.id
                    scored = None if i else request.score_from
                    one = dataclasses.replace(request, id=name, sampling=sampling, owner=caller.name, score_from=scored)
                    from_first = i == 0 and completion.HasField("score_from") and completion.score_from == 0
                    session = Session(
                        one, stops, self._texts.tokenizer, completion.stop_token_ids, from_first=from_first
                    )
                    await session.catch_up()
                    sessions.append(stack.enter_context(self._started(session, context, whole=whole, first=i == 0)))
                yield sessions

    @contextlib.contextmanager
    def _started(
        self, session: Session, context: grpc.aio.ServicerContext[Any, Any], *, whole: bool, first: bool
    ) -> Iterator[Session]:
        """A session, sent to a replica; however the block ends, the replica forgets it and times are counted."""
        call = CURRENT.get()
        self._router.start(session)
        call.session = session
        code = "OK"
        try:
            yield session
        except BaseException as error:
            code = code_name(error, context.time_remaining())
            raise
        finally:
            self._router.cancel(session)
            self._tell(call, session, code)
            self._admission.used(call.caller, _charged(session, code, whole=whole, first=first))

    def _tell(self, call: Call, session: Session, code: str) -> None:
        """Counts, traces and notes for the log what became of a session that ended with `code`."""
        ended, count, prompt = time.monotonic(), len(session.tokens), session.request.prompt
        labels = ("text_completion", self._model.name)
        cancelled = code in _GIVEN_UP
        reason = _reason(session) if session.finish else "cancelled" if cancelled else "error"
        metrics.COMPLETIONS.labels(call.caller.name, reason).inc()
        metrics.TOKENS.labels(call.caller.name, "prompt").inc(len(prompt))
        metrics.TOKENS.labels(call.caller.name, "completion").inc(count)
        metrics.PROMPT_LENGTH.observe(len(prompt))
        metrics.COMPLETION_LENGTH.observe(count)
        metrics.REQUEST_DURATION.labels(*labels, "" if code == "OK" else code).observe(ended - call.began)
        call.details.update(prompt_tokens=len(prompt), completion_tokens=count, finish_reason=reason)
        if self._log_prompts:
            call.details["prompt"] = self._texts.tokenizer.decode(prompt)
            call.details["completion"] = self._texts.tokenizer.decode([token.id for token in session.tokens])
        if session.first_token is None:
            return
        if session.timing is not None and session.arrivals is not None and not session.moved:
            # As tokens came, not as the client took them.
            decode, whole = session.arrivals[1] - session.arrivals[0], session.finish is not None
            self._router.forecast.learn(session.request, session.generated, session.timing.prefill, decode, whole=whole)
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


class Reading:
    """Cancels the current task, which sends parts to a client, if the client does not take one for too long: its tokens would
    be kept, and its place be held, as long as it pleases. `async with` is the stream's, `with` a part's."""

    def __init__(self) -> None:
        self._loop, self._task = asyncio.get_running_loop(), asyncio.current_task()
        self._since: float | None = None

    async def __aenter__(self) -> Reading:
        self._timer = self._loop.call_later(UNREAD_SECONDS, self._look)
        return self

    async def __aexit__(self, *_: object) -> None:
        self._timer.cancel()

    def __enter__(self) -> None:
        self._since = self._loop.time()

    def __exit__(self, *_: object) -> None:
        self._since = None

    def _look(self) -> None:
        now = self._loop.time()
        due = (now if self._since is None else self._since) + UNREAD_SECONDS
        if now < due:
            self._timer = self._loop.call_at(due, self._look)
        elif self._task is not None:
            self._task.cancel()


def _charged(session: Session, code: str, *, whole: bool, first: bool) -> int:
    """Tokens that a session costs its key: positions that were computed for it before its first token, once, however often it
    moved, and the tokens that were generated. Nothing if the client got nothing because the service failed.

    Args:
      session: that has ended.
      code: with which it did.
      whole: whether its caller gets all at once, or nothing.
      first: of the completions of its prompt.
    """
    if code in ("UNAVAILABLE", "INTERNAL") and (whole or not session.tokens):
        return 0
    if session.timing is not None:
        return session.timing.computed + session.generated
    # Of one that its caller gave up before, it is not known how far it was.
    given_up = first and code in _GIVEN_UP
    return session.generated + (len(session.request.prompt) if given_up else 0)


async def _whole(session: Session) -> generation_pb2.GenerateOnceResponse:
    """The answer that a session comes to, made as its tokens come."""
    response = generation_pb2.GenerateOnceResponse(request_id=session.request.id, seed=session.request.sampling.seed)
    texts = []
    while session.finish is None:
        deltas = await session.next_deltas()
        texts += [delta.text for delta in deltas]
        response.tokens.extend(_tokens(deltas))
        response.prompt.extend(scored_tokens(deltas))
        await asyncio.sleep(0)  # others' turn, however much has arrived
    response.text = "".join(texts)
    response.finish_reason = session.finish
    response.usage.CopyFrom(_usage(session))
    return response


def _reason(session: Session) -> str:
    name: str = generation_pb2.FinishReason.Name(session.finish or generation_pb2.FINISH_REASON_UNSPECIFIED)
    return name.removeprefix("FINISH_REASON_").lower()


def _part(session: Session, deltas: list[Delta], index: int, *, counted: bool) -> generation_pb2.GenerateResponse:
    return generation_pb2.GenerateResponse(
        request_id=session.request.id,
        text="".join(delta.text for delta in deltas),
        tokens=_tokens(deltas),
        prompt=scored_tokens(deltas),
        finish_reason=session.finish or generation_pb2.FINISH_REASON_UNSPECIFIED,
        usage=_usage(session) if counted or session.finish is not None else None,
        seed=session.request.sampling.seed,
        index=index,
    )


def _scored_text(session: Session, deltas: list[Delta], first: int) -> generation_pb2.ScoredText:
    usage = None if session.finish is None else _usage(session)
    return generation_pb2.ScoredText(first=first, tokens=scored_tokens(deltas), usage=usage)


def _tokens(deltas: list[Delta]) -> list[generation_pb2.GeneratedToken]:
    return [_token(delta.token) for delta in deltas if delta.token is not None]


def _token(token: Token) -> generation_pb2.GeneratedToken:
    top = [generation_pb2.TokenLogprob(id=id, logprob=logprob) for id, logprob in token.top]
    return generation_pb2.GeneratedToken(id=token.id, logprob=token.logprob, top=top)


def _usage(session: Session) -> generation_pb2.Usage:
    prompt, resumed = len(session.request.prompt), len(session.request.resumed)
    cached = len(session.request.context) + resumed - session.timing.computed if session.timing is not None else 0
    return generation_pb2.Usage(
        prompt_tokens=prompt,
        completion_tokens=resumed + len(session.tokens),
        cached_prompt_tokens=max(0, min(cached, prompt)),
    )
