"""How a client reaches a gateway: TLS, keys, and when gRPC itself tries a call again."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from typing import Any

import grpc

DEFAULT_ADDRESS = "127.0.0.1:50051"
#: Seconds before a second attempt, and at most before any, unless the server asks for more.
FIRST_PAUSE, LONGEST_PAUSE = 0.4, 3.0
#: The same, of a stream that has broken for the first time since it last brought something.
BROKEN_PAUSE = 0.1
#: Milliseconds before a channel connects again: gRPC itself would let a gateway that is back wait for many seconds.
_RECONNECT = (("grpc.initial_reconnect_backoff_ms", 200), ("grpc.max_reconnect_backoff_ms", 1000))
#: Times that gRPC itself sends a call, at most.
_MOST_ATTEMPTS = 5
#: Of the services' calls, those that answer at once and may be sent twice.
_RETRIED = {
    "GenerationService": ("GenerateOnce", "Score", "Tokenize", "Detokenize", "CountTokens", "GetModel"),
    "ClusterService": ("GetStatus",),
}


class ClientError(ValueError):
    """Something that a client can't be made of."""


@dataclasses.dataclass(frozen=True)
class Tls:
    """How to know the service, and to be known by it: PEM files.

    Attributes:
      ca: of the authority that signed the service's certificate; None for those that the system trusts.
      certificate, key: of this client, where the service wants to see one.
    """

    ca: pathlib.Path | None = None
    certificate: pathlib.Path | None = None
    key: pathlib.Path | None = None

    def credentials(self) -> grpc.ChannelCredentials:
        """For a channel. Raises OSError if a file can't be read, ClientError if only one of certificate and key is given."""
        if (self.certificate is None) != (self.key is None):
            given = self.certificate or self.key
            raise ClientError(f"a client's certificate and its key belong together; only {given} is given")
        ca, certificate, key = (
            f.read_bytes() if f is not None else None for f in (self.ca, self.certificate, self.key)
        )
        return grpc.ssl_channel_credentials(ca, key, certificate)


def channel_options(address: str, attempts: int) -> list[tuple[str, Any]]:
    """How a channel is: answers may have any size; a proxy that the environment names is none for this machine itself; it soon
    connects again; calls that answer at once are sent up to `attempts` times."""
    host = address.rpartition(":")[0].removeprefix("dns:").lstrip("/").strip("[]")
    local = host in ("localhost", "::1") or host.startswith("127.") or address.startswith("unix:")
    options: list[tuple[str, Any]] = [("grpc.max_receive_message_length", -1), *_RECONNECT]
    if attempts > 1:
        options.append(("grpc.service_config", json.dumps(_service_config(attempts))))
    return [*options, ("grpc.enable_http_proxy", 0)] if local else options


def _service_config(attempts: int) -> dict[str, Any]:
    policy = {
        "maxAttempts": min(attempts, _MOST_ATTEMPTS),
        "initialBackoff": f"{FIRST_PAUSE}s",
        "maxBackoff": f"{LONGEST_PAUSE}s",
        "backoffMultiplier": 2,
        # A gateway that has just stopped cancels calls that reach it before the client knows.
        "retryableStatusCodes": ["UNAVAILABLE", "CANCELLED"],
    }
    names = [
        {"service": f"grok.serving.v1.{service}", "method": method}
        for service, methods in _RETRIED.items()
        for method in methods
    ]
    return {"methodConfig": [{"name": names, "retryPolicy": policy}]}


def key_metadata(api_key: str | None) -> tuple[tuple[str, str], ...]:
    """The metadata that bring a key, which may end with a line end, as what is read from a file does. Raises ClientError."""
    key = (api_key or "").strip()
    if not all(" " < character <= "~" for character in key):
        raise ClientError("the API key has characters that no key has: it is made of letters, digits, '-' and '_'")
    return (("authorization", f"Bearer {key}"),) if key else ()
