"""Errors in OpenAI's form, with the same reasons as gRPC's."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import grpc
from fastapi import Response
from fastapi.responses import JSONResponse

from cluster.gateway.errors import GatewayError

_CODES = grpc.StatusCode
#: HTTP's status and OpenAI's type of each code.
_STATUS: Mapping[grpc.StatusCode, tuple[int, str]] = {
    _CODES.INVALID_ARGUMENT: (400, "invalid_request_error"),
    _CODES.NOT_FOUND: (404, "invalid_request_error"),
    _CODES.FAILED_PRECONDITION: (422, "invalid_request_error"),
    _CODES.UNAUTHENTICATED: (401, "authentication_error"),
    _CODES.PERMISSION_DENIED: (403, "permission_error"),
    _CODES.RESOURCE_EXHAUSTED: (429, "rate_limit_error"),
    _CODES.UNAVAILABLE: (503, "server_error"),
    _CODES.DEADLINE_EXCEEDED: (504, "server_error"),
    _CODES.ABORTED: (409, "invalid_request_error"),
    _CODES.CANCELLED: (499, "invalid_request_error"),
    _CODES.INTERNAL: (500, "server_error"),
}
#: What fields of a Completion are called here, where they have other names.
_PARAMS = {"text": "prompt", "tokens": "prompt", "allowed_tokens": "allowed_token_ids", "resume": "prompt"}
#: How pydantic names kinds of values.
_KINDS = ("str", "int")
#: Reasons that OpenAI's clients know by names of its own.
_REASONS = {"UNKNOWN_KEY": "invalid_api_key", "NO_MODEL": "model_not_found"}


def body_of(error: GatewayError) -> dict[str, Any]:
    """The error as clients read it."""
    fields = [(_param(violation.field), violation.problem) for violation in error.violations]
    return {
        "error": {
            "message": "; ".join(f"{field}: {problem}" for field, problem in fields) or str(error),
            "type": _STATUS[error.code][1],
            "param": fields[0][0] if fields else None,
            "code": _REASONS.get(error.reason, error.reason.lower()),
        }
    }


def response_of(error: GatewayError) -> Response:
    """The answer to a call that has failed before anything was sent."""
    headers = {} if error.retry_seconds is None else {"retry-after": str(math.ceil(error.retry_seconds))}
    return JSONResponse(body_of(error), _STATUS[error.code][0], headers)


def no_model(asked: str, served: str) -> GatewayError:
    """NOT_FOUND: another model is asked for than there is."""
    return GatewayError(_CODES.NOT_FOUND, "NO_MODEL", f"there is no model {asked!r} here; this service has {served!r}")


def too_late() -> GatewayError:
    """DEADLINE_EXCEEDED: the time that the client gave is over."""
    return GatewayError(_CODES.DEADLINE_EXCEEDED, "DEADLINE", "the time that x-request-timeout gave is over")


def unread() -> GatewayError:
    """CANCELLED: the client has left a part of its stream unread for too long."""
    return GatewayError(_CODES.CANCELLED, "UNREAD", "the stream was not read, and so its completion was ended")


def field_name(location: Sequence[int | str]) -> str:
    """A field of a request's body, as pydantic locates it, without the kinds of the values that were tried."""
    names = [str(part) for part in location if isinstance(part, int) or (part.isidentifier() and part not in _KINDS)]
    return ".".join(names[1:] or names)


def _param(field: str) -> str:
    name = field.removeprefix("completion.").removeprefix("sampling.")
    return _PARAMS.get(name, name)
