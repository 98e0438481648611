"""A stream that outlives gateways: what it has brought, and the request for what is missing."""

from __future__ import annotations

import dataclasses
import random
from typing import Any

import grpc
from google.rpc import error_details_pb2, status_pb2

from grok.serving.v1 import generation_pb2
from grokmesh.channel import BROKEN_PAUSE, FIRST_PAUSE, LONGEST_PAUSE
from grokmesh.completions import Completion, completion_of

#: Of pauses: not the one that programs seed for their own ends.
_RANDOM = random.Random()
#: What gRPC says of calls whose channel was closed meanwhile.
_CLOSED = "Channel closed"
_STATUS = "grpc-status-details-bin"


class ResumingStream:
    """A stream over as many calls as it takes. Several completions that broke off go on one after the other.

    `request` is that of the next call, as long as the stream has not `ended`.
    """

    def __init__(self, completion: generation_pb2.Completion, attempts: int) -> None:
        self.request = generation_pb2.GenerateRequest(completion=completion)
        self._whole = completion
        self._attempts = attempts
        self._failed = 0
        self._missing = list(range(max(1, completion.n)))
        self._tokens: dict[int, list[int]] = {index: [] for index in self._missing}
        self._scored = 0
        self._seed: int | None = None
        # The completion that the current call is for, if not for all.
        self._only: int | None = None

    @property
    def ended(self) -> bool:
        """Whether all completions are whole."""
        return not self._missing

    def take(self, response: generation_pb2.GenerateResponse) -> Completion:
        """Notes what has come."""
        index = response.index if self._only is None else self._only
        self._seed = (response.seed - index) % 2**64  # of several completions each has the next seed
        self._tokens[index].extend(token.id for token in response.tokens)
        self._scored += len(response.prompt)
        if response.finish_reason and index in self._missing:
            self._missing.remove(index)
        self._failed = 0
        return dataclasses.replace(completion_of(response), index=index)

    def over(self) -> None:
        """A call has ended well: what it was for is whole."""
        if self._only is None:
            self._missing.clear()
        elif self._only in self._missing:
            self._missing.remove(self._only)
        self._next()

    def pause(self, error: Any) -> float:
        """Seconds to wait before the next call; 0 if nothing is missing. Raises the error if there is to be none."""
        if self.ended:
            return 0.0
        self._failed += 1
        # Closing a channel here cancels its calls. A gateway that has just stopped does that too, to calls that reach it before
        # the client knows.
        gone = error.code() is grpc.StatusCode.CANCELLED and _CLOSED not in (error.details() or "")
        if not (gone or error.code() is grpc.StatusCode.UNAVAILABLE) or self._failed >= self._attempts:
            raise error
        self._next()
        # One broken stream is no sign of load: another gateway can go on at once.
        longest = min(LONGEST_PAUSE, FIRST_PAUSE * 2 ** (self._failed - 2)) if self._failed > 1 else BROKEN_PAUSE
        backoff: float = longest * _RANDOM.uniform(0.5, 1.0)
        return max(backoff, _asked_for(error))

    def _next(self) -> None:
        """Makes the next request."""
        if self.ended or self._seed is None:  # nothing has come, so the first request stands
            return
        index = self._only = self._missing[0]
        completion = self.request.completion
        completion.CopyFrom(self._whole)
        completion.n = 1
        completion.sampling.seed = (self._seed + index) % 2**64
        completion.resume.ids.extend(self._tokens[index])
        if index or self._tokens[0]:
            completion.ClearField("score_from")
        elif completion.HasField("score_from"):
            completion.score_from += self._scored


def _asked_for(error: Any) -> float:
    """The pause that the error's RetryInfo asks for, in seconds."""
    metadata = dict(error.trailing_metadata() or ())
    for detail in status_pb2.Status.FromString(metadata.get(_STATUS, b"")).details:
        info = error_details_pb2.RetryInfo()
        if detail.Unpack(info):
            return info.retry_delay.ToMilliseconds() / 1000
    return 0.0
