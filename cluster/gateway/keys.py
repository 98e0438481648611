"""API keys: the file holds names, hashes, scopes and limits; clients send `authorization: Bearer KEY`."""

from __future__ import annotations

import dataclasses
import hashlib
import pathlib
import re
import secrets
from collections.abc import Iterable
from typing import Any

import grpc
import yaml

from cluster.gateway.errors import GatewayError
from cluster.gateway.reloading import Reloading

#: Of a request, up or down.
MAX_PRIORITY = 10
#: What a key may do: complete prompts and look on, or also take traces of the hosts.
SCOPES = ("generate", "admin")

_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")
_HASH = re.compile(r"[0-9a-f]{64}")


class KeysError(ValueError):
    """A file of keys that can't be used."""


@dataclasses.dataclass(frozen=True)
class Caller:
    """Who calls.

    Attributes:
      name: of the key.
      scopes: of SCOPES.
      max_requests: completions that the key may have in the gateway at once; None for no limit of its own.
      tokens_per_minute: prompt and drawn tokens that it may use, with a minute's worth at a time; None for no limit.
      max_priority: the highest that it may ask for: who comes first to slots is nobody else's choice.
    """

    name: str
    scopes: tuple[str, ...] = ("generate",)
    max_requests: int | None = None
    tokens_per_minute: int | None = None
    max_priority: int = 0


#: Callers where no keys are asked for.
ANONYMOUS = Caller("anonymous", SCOPES, max_priority=MAX_PRIORITY)


def new_key(name: str) -> tuple[str, str]:
    """A new key and the line for the file. Raises KeysError if the name is not one."""
    if not _NAME.fullmatch(name):
        raise KeysError(f"{name!r} is no name for a key: use lower-case letters, digits, '.', '_' and '-'")
    key = f"gm-{secrets.token_urlsafe(32)}"
    return key, f"{name}: {_digest(key)}"


class Keys:
    """Who may call. A key has 256 random bits, so its plain SHA-256 can't be turned back.

    A file that changes is read again within a second or so; one that holds no keys any more changes nothing.
    """

    def __init__(self, path: pathlib.Path) -> None:
        """Reads a file of keys. Raises KeysError, which names file and entry."""
        self._callers = Reloading((path,), lambda: _read(path), KeysError)

    @classmethod
    def load(cls, path: pathlib.Path | None) -> Keys | None:
        """The keys of a file, None without one. Raises KeysError, which names file and entry."""
        return None if path is None else cls(path)

    def caller(self, metadata: Iterable[tuple[str, str | bytes]]) -> Caller:
        """Whose key a call brings. Raises GatewayError (UNAUTHENTICATED)."""
        header = next((value for key, value in metadata if key == "authorization"), "")
        kind, _, key = str(header).partition(" ")
        # Looking the hash up leaks no more by its timing than how much of a hash agrees, which leads to no key.
        caller = self._callers.get().get(_digest(key.strip())) if kind.lower() == "bearer" else None
        if caller is None:
            raise GatewayError(
                grpc.StatusCode.UNAUTHENTICATED,
                "UNKNOWN_KEY",
                "this service wants an API key: send `authorization: Bearer KEY`",
            )
        return caller


def _read(path: pathlib.Path) -> dict[str, Caller]:
    try:
        entries = yaml.safe_load(path.read_text())
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise KeysError(f"{path}: {error}") from error
    if not isinstance(entries, dict) or not entries:
        raise KeysError(f"{path}: must hold lines of `name: SHA-256 of the key`; grokmesh key makes them")
    callers: dict[str, Caller] = {}
    for name, entry in entries.items():
        fields = dict(entry) if isinstance(entry, dict) else {"sha256": entry}
        digest = str(fields.pop("sha256", ""))
        if not _NAME.fullmatch(str(name)) or not _HASH.fullmatch(digest):
            raise KeysError(f"{path}: {name} is no name with the SHA-256 of a key; grokmesh key makes them")
        if digest in callers:
            raise KeysError(f"{path}: {name} has the key of {callers[digest].name}")
        callers[digest] = _caller(f"{path}: {name}", str(name), fields)
    return callers


def _caller(where: str, name: str, fields: dict[str, Any]) -> Caller:
    scopes = fields.pop("scopes", ["generate"])
    if not isinstance(scopes, list) or not scopes or not all(scope in SCOPES for scope in scopes):
        raise KeysError(f"{where}: scopes must be a list of {' and '.join(SCOPES)}")
    limits = {limit: fields.pop(limit, None) for limit in ("max_requests", "tokens_per_minute")}
    for limit, value in limits.items():
        if value is not None and (type(value) is not int or value < 1):
            raise KeysError(f"{where}: {limit}={value} must be a whole number of at least 1")
    priority = fields.pop("max_priority", 0)
    if type(priority) is not int or abs(priority) > MAX_PRIORITY:
        raise KeysError(
            f"{where}: max_priority={priority} must be a whole number from -{MAX_PRIORITY} to {MAX_PRIORITY}"
        )
    if fields:
        raise KeysError(
            f"{where}: {next(iter(fields))} is unknown; "
            "use sha256, scopes, max_requests, tokens_per_minute, max_priority"
        )
    return Caller(name, tuple(scopes), **limits, max_priority=priority)


def _digest(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()
