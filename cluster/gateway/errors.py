"""Errors as clients get them: google.rpc.Status with details."""

from __future__ import annotations

import asyncio
import dataclasses

import grpc
import grpc.aio
from google.protobuf import any_pb2, duration_pb2
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc_status import rpc_status

DOMAIN = "grokmesh"
#: By which clients that let gRPC try again know when.
_PUSHBACK = "grpc-retry-pushback-ms"
#: A status travels in metadata, of which clients take 8 KiB: so many violations are listed, with so many bytes of each and
#: of the message.
MOST_VIOLATIONS, PROBLEM_BYTES, MESSAGE_BYTES = 8, 256, 512


#: Seconds that a request may have travelled: by so much earlier a client reaches its deadline than its gateway does.
TRAVEL_SECONDS = 0.25


@dataclasses.dataclass(frozen=True)
class Violation:
    """A field that is wrong, and why."""

    field: str
    problem: str


@dataclasses.dataclass(frozen=True)
class _Status(grpc.Status):
    code: grpc.StatusCode
    details: str
    trailing_metadata: tuple[tuple[str, str | bytes], ...]


class GatewayError(Exception):
    """An error with a status code, a machine-readable reason and what the client can do."""

    def __init__(
        self,
        code: grpc.StatusCode,
        reason: str,
        message: str,
        *,
        violations: tuple[Violation, ...] = (),
        retry_seconds: float | None = None,
    ) -> None:
        super().__init__(message)
        self.code = code
        self.reason = reason
        self.violations = violations
        self.retry_seconds = retry_seconds

    def status(self) -> grpc.Status:
        """The status with its details: ErrorInfo always, BadRequest and RetryInfo where they say something."""
        details = [error_details_pb2.ErrorInfo(reason=self.reason, domain=DOMAIN)]
        packed = [_pack(detail) for detail in details]
        if self.violations:
            fields = [
                error_details_pb2.BadRequest.FieldViolation(
                    field=_cut(v.field, 64), description=_cut(v.problem, PROBLEM_BYTES)
                )
                for v in self.violations[:MOST_VIOLATIONS]
            ]
            packed.append(_pack(error_details_pb2.BadRequest(field_violations=fields)))
        if self.retry_seconds is not None:
            delay = duration_pb2.Duration()
            delay.FromMilliseconds(round(self.retry_seconds * 1000))
            packed.append(_pack(error_details_pb2.RetryInfo(retry_delay=delay)))
        code: int = self.code.value[0]
        assert code in code_pb2.Code.values()
        status = status_pb2.Status(code=code, message=_cut(str(self), MESSAGE_BYTES), details=packed)
        metadata = rpc_status.to_status(status).trailing_metadata or ()
        if self.retry_seconds is not None:  # gRPC's core never goes on after a pushback of 0
            metadata = (*metadata, (_PUSHBACK, str(max(1, round(self.retry_seconds * 1000)))))
        return _Status(self.code, status.message, metadata)


def code_name(error: BaseException | None, seconds_left: float | None) -> str:
    """Name of the status code with which a call ends that raised `error`, with `seconds_left` of its deadline as it is
    reckoned here: from the call's arrival."""
    if error is None:
        return "OK"
    if isinstance(error, GatewayError):
        return error.code.name
    if isinstance(error, (asyncio.CancelledError, GeneratorExit, grpc.aio.AbortError)):
        late = seconds_left is not None and seconds_left <= TRAVEL_SECONDS
        return "DEADLINE_EXCEEDED" if late else "CANCELLED"
    return "INTERNAL"


def invalid(violations: list[Violation]) -> GatewayError:
    """INVALID_ARGUMENT for fields of a request."""
    message = "; ".join(f"{v.field}: {v.problem}" for v in violations)
    return GatewayError(grpc.StatusCode.INVALID_ARGUMENT, "INVALID_FIELD", message, violations=tuple(violations))


def malformed(problem: str) -> GatewayError:
    """INVALID_ARGUMENT: the call has no message that can be read."""
    return GatewayError(grpc.StatusCode.INVALID_ARGUMENT, "MALFORMED_MESSAGE", problem)


def unavailable(message: str, retry_seconds: float = 1.0) -> GatewayError:
    """UNAVAILABLE: the same call may succeed later."""
    return GatewayError(grpc.StatusCode.UNAVAILABLE, "REPLICA_UNAVAILABLE", message, retry_seconds=retry_seconds)


def breaking(message: str) -> GatewayError:
    """INTERNAL: the request breaks whatever computes it, and must not be sent again."""
    return GatewayError(grpc.StatusCode.INTERNAL, "REPLICAS_LOST", message)


def failed(message: str) -> GatewayError:
    """FAILED_PRECONDITION: the completion was begun and can't go on; trying again changes nothing."""
    return GatewayError(grpc.StatusCode.FAILED_PRECONDITION, "COMPLETION_FAILED", message)


def cancelled() -> GatewayError:
    """ABORTED: another call has ended this one."""
    return GatewayError(grpc.StatusCode.ABORTED, "CANCELLED", "it was cancelled by its request id")


#: Reason of errors that a key's own limits cause.
KEY_LIMIT = "KEY_LIMIT"


def exhausted(message: str, retry_seconds: float, reason: str = "OVERLOADED") -> GatewayError:
    """RESOURCE_EXHAUSTED: too much is asked at once."""
    return GatewayError(grpc.StatusCode.RESOURCE_EXHAUSTED, reason, message, retry_seconds=retry_seconds)


def _cut(text: str, most: int) -> str:
    """A text of at most so many bytes. ASCII as it travels: other characters take several times as many in a status."""
    plain = text.encode("ascii", "backslashreplace").decode()
    return plain if len(plain) <= most else f"{plain[: most - 3]}..."


def _pack(
    message: error_details_pb2.ErrorInfo | error_details_pb2.BadRequest | error_details_pb2.RetryInfo,
) -> any_pb2.Any:
    packed = any_pb2.Any()
    packed.Pack(message)
    return packed
