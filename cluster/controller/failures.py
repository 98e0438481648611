"""What an epoch's failure says: in a few words, and of which host."""

from __future__ import annotations

from cluster.controller.placement import HostError
from workers.host.streams import LinkError


def accused(failure: Exception) -> HostError | None:
    """The host that a failure speaks of, None if of none. A worker whose stream broke accuses the peer of that stream."""
    if not isinstance(failure, HostError):
        return None
    cause = getattr(failure.error, "cause", failure.error)
    if not isinstance(cause, LinkError):
        return failure
    return None if cause.rank is None else HostError(cause.rank, cause)


def summary(error: BaseException) -> str:
    """The first sentence of an error's last line, which in Ray's says what the worker raised."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (
        f"{type(error).__name__}: {lines[-1].split('. ')[0].split(' Worker exit type')[0]}"
        if lines
        else type(error).__name__
    )
