"""Between the engine's dataclasses and the messages of `grok.engine.v1`."""

from __future__ import annotations

from grok.engine.v1 import engine_pb2
from workers.messages.plan import Admission, Chunk, Draft, Forced, Growth, Mask, Plan, Sampling, Token
from workers.messages.request import Finish, Load, Request, Timing, TokenEvent

_FINISH = {
    None: engine_pb2.FINISH_UNSPECIFIED,
    Finish.STOP: engine_pb2.FINISH_STOP,
    Finish.LENGTH: engine_pb2.FINISH_LENGTH,
}
_FINISH_BACK = {value: key for key, value in _FINISH.items()}


def sampling_to_proto(sampling: Sampling) -> engine_pb2.Sampling:
    """As a message."""
    return engine_pb2.Sampling(
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        seed=sampling.seed,
        bias_tokens=[token for token, _ in sampling.logit_bias],
        bias_values=[value for _, value in sampling.logit_bias],
        allowed_tokens=sampling.allowed_tokens,
        min_p=sampling.min_p,
        repetition_penalty=sampling.repetition_penalty,
        presence_penalty=sampling.presence_penalty,
        frequency_penalty=sampling.frequency_penalty,
        masked=sampling.masked,
    )


def sampling_from_proto(message: engine_pb2.Sampling) -> Sampling:
    """From a message."""
    return Sampling(
        temperature=message.temperature,
        top_p=message.top_p,
        top_k=message.top_k,
        seed=message.seed,
        logit_bias=tuple(zip(message.bias_tokens, message.bias_values, strict=True)),
        allowed_tokens=tuple(message.allowed_tokens),
        min_p=message.min_p,
        repetition_penalty=message.repetition_penalty,
        presence_penalty=message.presence_penalty,
        frequency_penalty=message.frequency_penalty,
        masked=message.masked,
    )


def request_to_proto(request: Request) -> engine_pb2.Submit:
    """As a message."""
    return engine_pb2.Submit(
        request_id=request.id,
        prompt=request.prompt,
        max_tokens=request.max_tokens,
        sampling=sampling_to_proto(request.sampling),
        stop_tokens=sorted(request.stop_tokens),
        priority=request.priority,
        grammar=request.grammar,
        resumed=request.resumed,
        owner=request.owner,
    )


def request_from_proto(message: engine_pb2.Submit) -> Request:
    """From a message."""
    return Request(
        id=message.request_id,
        prompt=tuple(message.prompt),
        max_tokens=message.max_tokens,
        sampling=sampling_from_proto(message.sampling),
        stop_tokens=frozenset(message.stop_tokens),
        priority=message.priority,
        grammar=message.grammar,
        resumed=tuple(message.resumed),
        owner=message.owner,
    )


def plan_to_proto(plan: Plan, epoch: int) -> engine_pb2.Plan:
    """As a message of `epoch`."""
    return engine_pb2.Plan(
        epoch=epoch,
        number=plan.number,
        admissions=[
            engine_pb2.Admission(
                slot=a.slot,
                pages=a.pages,
                sampling=sampling_to_proto(a.sampling),
                request_id=a.request_id,
                prompt=a.prompt,
                drawn=a.drawn,
            )
            for a in plan.admissions
        ],
        prefills=[
            engine_pb2.Prefill(
                chunks=[engine_pb2.Chunk(slot=c.slot, start=c.start, tokens=c.tokens, last=c.last) for c in chunks]
            )
            for chunks in plan.prefills
        ],
        decode=plan.decode,
        masks=[engine_pb2.Mask(slot=mask.slot, words=mask.words) for mask in plan.masks],
        drafts=[engine_pb2.Draft(slot=d.slot, position=d.position, tokens=d.tokens) for d in plan.drafts],
        steps=plan.steps,
        growths=[engine_pb2.Growth(slot=g.slot, first=g.first, pages=g.pages) for g in plan.growths],
        forced=[engine_pb2.Forced(slot=f.slot, token=f.token) for f in plan.forced],
    )


def plan_from_proto(message: engine_pb2.Plan) -> Plan:
    """From a message."""
    return Plan(
        number=message.number,
        admissions=tuple(
            Admission(
                a.slot, tuple(a.pages), sampling_from_proto(a.sampling), a.request_id, tuple(a.prompt), tuple(a.drawn)
            )
            for a in message.admissions
        ),
        prefills=tuple(
            tuple(Chunk(c.slot, c.start, tuple(c.tokens), c.last) for c in prefill.chunks)
            for prefill in message.prefills
        ),
        decode=tuple(message.decode),
        masks=tuple(Mask(mask.slot, mask.words) for mask in message.masks),
        drafts=tuple(Draft(d.slot, d.position, tuple(d.tokens)) for d in message.drafts),
        steps=message.steps,
        growths=tuple(Growth(g.slot, g.first, tuple(g.pages)) for g in message.growths),
        forced=tuple(Forced(f.slot, f.token) for f in message.forced),
    )


def event_to_proto(event: TokenEvent) -> engine_pb2.TokenEvent:
    """As a message."""
    token, timing = event.token, event.timing
    return engine_pb2.TokenEvent(
        request_id=event.request_id,
        token=engine_pb2.Token(
            id=token.id,
            logprob=token.logprob,
            top_ids=[id for id, _ in token.top],
            top_logprobs=[logprob for _, logprob in token.top],
        ),
        finish=_FINISH[event.finish],
        timing=None
        if timing is None
        else engine_pb2.Timing(queue_seconds=timing.queue, prefill_seconds=timing.prefill, computed=timing.computed),
    )


def event_from_proto(message: engine_pb2.TokenEvent) -> TokenEvent:
    """From a message. Raises ValueError if it is none that a leader sends."""
    token = message.token
    if message.finish not in _FINISH_BACK:
        raise ValueError(f"finish {message.finish} is unknown")
    top = tuple(zip(token.top_ids, token.top_logprobs, strict=True))
    timing = None
    if message.HasField("timing"):
        timing = Timing(message.timing.queue_seconds, message.timing.prefill_seconds, message.timing.computed)
    return TokenEvent(message.request_id, Token(token.id, token.logprob, top), _FINISH_BACK[message.finish], timing)


def load_to_proto(
    load: Load, slots: int, compilations: int, routing: list[engine_pb2.Routing] | None = None
) -> engine_pb2.Load:
    """As a message, with the engine's slots, the programs that it compiled since warm-up, and what the router did."""
    return engine_pb2.Load(
        running=load.running,
        waiting=load.waiting,
        pages_used=load.pages_used,
        pages_total=load.pages_total,
        pages_cached=load.pages_cached,
        positions=load.positions,
        slots=slots,
        compilations=compilations,
        routing=routing,
    )
