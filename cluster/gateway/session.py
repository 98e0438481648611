"""A completion in the making: prompt, parameters and the tokens so far. That is all that is needed to go on elsewhere, since
sampling depends on seed and position alone."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import Collection

from cluster.gateway.errors import GatewayError, Violation, invalid, unavailable
from cluster.gateway.stop import StopMatcher, StopTexts
from grok.serving.v1 import generation_pb2
from workers.messages.plan import Score, Token
from workers.messages.request import TRIAL_TOKENS, Finish, Request, ScoreEvent, Timing, TokenEvent
from workers.text.tokenizer import Detokenizer, Tokenizer

#: Tokens that are turned into text at a time: about a millisecond, in which nothing else of the gateway runs.
SLICE = 32


@dataclasses.dataclass(frozen=True)
class Delta:
    """What a token, or scores of the prompt's, add.

    Attributes:
      text: that is certain now.
      token: that was drawn, if it is one.
      finish: why it was the last.
      scored: the next tokens of the prompt and what became of them; None for the first of all, which follows none.
    """

    text: str
    token: Token | None
    finish: generation_pb2.FinishReason.ValueType | None
    scored: tuple[tuple[int, Score | None], ...] = ()


class Session:
    """One completion: what was asked, what came, and what waits to be sent to the client."""

    def __init__(
        self,
        request: Request,
        stops: StopTexts,
        tokenizer: Tokenizer,
        stop_tokens: Collection[int] = (),
        *,
        from_first: bool = False,
    ) -> None:
        """Before anything else of one with resumed tokens, `catch_up` must be called. `stop_tokens` are those of the request's
        that its caller has named. With `from_first` the prompt's first token is delivered before the others that are scored."""
        self.request = request
        self.tokens: list[Token] = []
        self.first_token: float | None = None
        self.timing: Timing | None = None
        self.finish: generation_pb2.FinishReason.ValueType | None = None
        #: Where it runs, or ran last.
        self.replica, self.epoch = 0, 0
        #: Replicas that were lost with it since it last came on, and those of them that computed nothing else.
        self.losses, self.trials = 0, 0
        #: Whether it was ever resumed, and when its first and last tokens came, from leaders.
        self.moved = False
        self.arrivals: tuple[float, float] | None = None
        self._kept = 0
        self._received: list[int] = list(request.resumed)
        self._unscored = request.score_from
        self._untold: tuple[tuple[int, Score | None], ...] = ((request.prompt[0], None),) if from_first else ()
        self._stop = StopMatcher(stops)
        self._stop_tokens = frozenset(stop_tokens)
        self._detokenizer = Detokenizer(tokenizer, request.prompt)
        self._arrived: asyncio.Queue[TokenEvent | Delta | GatewayError] = asyncio.Queue()

    async def catch_up(self) -> None:
        """Takes note of the text of the resumed tokens, which another stream has brought. Raises GatewayError
        (INVALID_ARGUMENT) if it holds a stop text."""
        for i, token in enumerate(self.request.resumed, 1):
            if self._stop.push(self._detokenizer.push(token))[1]:
                raise invalid([Violation("completion.resume", "has a stop text: that completion is whole")])
            if i % SLICE == 0:
                await asyncio.sleep(0)

    @property
    def generated(self) -> int:
        """Tokens that have arrived from a leader."""
        return len(self._received) - len(self.request.resumed)

    @property
    def owed(self) -> int:
        """Tokens that it still waits for, those of its prompt among them until the first has come."""
        prompt = 0 if self.generated else len(self.request.prompt)
        return prompt + self.request.max_tokens - len(self._received)

    @property
    def suspect(self) -> bool:
        """Whether it may be what breaks replicas: two in a row were lost with it, and it has not come on since."""
        return self.losses >= 2 and not self.proceeded

    @property
    def proceeded(self) -> bool:
        """Whether it has come on since a replica was last lost with it."""
        return len(self._received) >= self._kept + TRIAL_TOKENS

    def lose(self, *, alone: bool) -> None:
        """Notes that its replica is lost, which computed nothing else if it was `alone`."""
        self.moved = True
        if self.proceeded:
            self.losses = self.trials = 0
        self.losses += 1
        self.trials += alone
        self._kept = len(self._received)

    def rest(self) -> Request:
        """The request as it is now: what asks any replica for the tokens that have not arrived yet."""
        return dataclasses.replace(
            self.request, resumed=tuple(self._received), trial=self.suspect, score_from=self._unscored
        )

    def deliver(self, event: TokenEvent | ScoreEvent | GatewayError) -> None:
        """Hands over what a leader sent for this session, or the error that ends it."""
        if isinstance(event, ScoreEvent):
            self._arrived.put_nowait(self._scored(event))
            return
        if isinstance(event, TokenEvent) and self._unscored is not None:
            event = unavailable("the replica is of an earlier release, which scores no prompts")
        if isinstance(event, TokenEvent):
            self._received.append(event.token.id)
            now = time.monotonic()
            self.arrivals = (self.arrivals[0] if self.arrivals else now, now)
        self._arrived.put_nowait(event)

    def _scored(self, event: ScoreEvent) -> Delta:
        """Takes note of what became of the next tokens of the prompt."""
        assert self._unscored is not None
        first = self._unscored
        self._unscored += len(event.scores)
        scored = tuple(zip(self.request.prompt[first : self._unscored], event.scores, strict=True))
        if self._unscored == len(self.request.prompt):
            self._unscored = None
        if event.done:
            self.timing = event.timing
        return Delta("", None, generation_pb2.FINISH_REASON_LENGTH if event.done else None, scored)

    async def next_deltas(self) -> list[Delta]:
        """What has arrived, from one token to SLICE. The last of all has a finish. Raises GatewayError."""
        events = [await self._arrived.get()]
        while not self._arrived.empty() and len(events) < SLICE:
            events.append(self._arrived.get_nowait())
        deltas: list[Delta] = []
        for event in events:
            if isinstance(event, GatewayError):
                if deltas:
                    self._arrived.put_nowait(event)
                    break
                raise event
            deltas.append(event if isinstance(event, Delta) else self._take(event))
            self.finish = deltas[-1].finish
            if self.finish is not None:
                break
        if self._untold:
            deltas[0] = dataclasses.replace(deltas[0], scored=self._untold + deltas[0].scored)
            self._untold = ()
        return deltas

    def _take(self, event: TokenEvent) -> Delta:
        if self.first_token is None:
            self.first_token = time.monotonic()
            self.timing = event.timing
        self.tokens.append(event.token)
        if event.finish is Finish.EOS:  # the end token itself has no text
            text, stopped = self._stop.push(self._detokenizer.flush())
            named = event.token.id in self._stop_tokens
            finish = generation_pb2.FINISH_REASON_STOP if stopped or named else generation_pb2.FINISH_REASON_EOS
            return Delta(text if stopped else text + self._stop.flush(), event.token, finish)
        text, stopped = self._stop.push(self._detokenizer.push(event.token.id))
        if not stopped and event.finish is Finish.LENGTH:
            rest, stopped = self._stop.push(self._detokenizer.flush())
            text += rest if stopped else rest + self._stop.flush()
        if stopped:
            return Delta(text, event.token, generation_pb2.FINISH_REASON_STOP)
        return Delta(text, event.token, generation_pb2.FINISH_REASON_LENGTH if event.finish is Finish.LENGTH else None)
