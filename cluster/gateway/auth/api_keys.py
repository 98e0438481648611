"""API keys: the file holds names, hashes, scopes and limits; clients send `authorization: Bearer KEY`."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import pathlib
import re
import secrets
from collections.abc import Iterable
from typing import Any

import grpc
import yaml

from cluster.gateway.auth.reloading import Reloading
from cluster.gateway.errors import GatewayError

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
    """The owner of a key, and what it may do.

    Attributes:
      name: of the key.
      scopes: of SCOPES.
      max_requests: completions that the key may have in the gateway at once; None for no limit of its own.
      tokens_per_minute: prompt and generated tokens that it may use, with a minute's worth at a time; None for no limit.
      max_priority: the highest priority that it may ask for.
    """

    name: str
    scopes: tuple[str, ...] = ("generate",)
    max_requests: int | None = None
    tokens_per_minute: int | None = None
    max_priority: int = 0


#: Callers where no keys are asked for. They complete prompts, and nothing else.
ANONYMOUS = Caller("anonymous")
#: The user of the service's process, on its own machine.
LOCAL_ADMIN = Caller("local-admin", SCOPES, max_priority=MAX_PRIORITY)


def new_key(name: str) -> tuple[str, str]:
    """A new key and the line for the file. Raises KeysError if the name is not one."""
    if not _NAME.fullmatch(name):
        raise KeysError(f"{name!r} is no name for a key: use lower-case letters, digits, '.', '_' and '-'")
    key = f"gm-{secrets.token_urlsafe(32)}"
    return key, f"{name}: {_digest(key)}"


class Keys:
    """The keys of a service. A key has 256 random bits, so its plain SHA-256 can't be turned back.

    A file that changes is read again within a second or so; one that holds no keys any more changes nothing.
    """

    def __init__(self, path: pathlib.Path | None, admin_key: str = "") -> None:
        """Reads a file of keys; without one, every caller may complete prompts. `admin_key` is the local administrator's.
        Raises KeysError, which names file and entry."""
        self._callers = None if path is None else Reloading((path,), lambda: _read(path), KeysError)
        self._admin = _digest(admin_key) if admin_key else ""

    def caller(self, metadata: Iterable[tuple[str, str | bytes]]) -> Caller:
        """Whose key a call brings. Raises GatewayError (UNAUTHENTICATED)."""
        header = next((value for key, value in metadata if key == "authorization"), "")
        kind, _, key = str(header).partition(" ")
        # Looking the hash up leaks no more by its timing than how much of a hash agrees, which leads to no key.
        digest = _digest(key.strip()) if kind.lower() == "bearer" else None
        if digest == self._admin:
            return LOCAL_ADMIN
        if self._callers is None:
            return ANONYMOUS
        caller = self._callers.get().get(digest) if digest else None
        if caller is None:
            raise GatewayError(
                grpc.StatusCode.UNAUTHENTICATED,
                "UNKNOWN_KEY",
                "this service wants an API key: send `authorization: Bearer KEY`",
            )
        return caller


def _read(path: pathlib.Path) -> dict[str, Caller]:
    """The callers by the hashes of their keys. What stands there is taken as it stands: `no` and `010` are names."""
    try:
        root = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise KeysError(f"{path}: {error}") from error
    if not isinstance(root, yaml.MappingNode) or not root.value:
        raise KeysError(f"{path}: must hold lines of `name: SHA-256 of the key`; grokmesh key makes them")
    callers: dict[str, Caller] = {}
    names: set[str] = set()
    for name_node, entry in root.value:
        name = str(name_node.value)
        where = f"{path}:{name_node.start_mark.line + 1}: {name}"
        fields = _fields(entry, where) if isinstance(entry, yaml.MappingNode) else {"sha256": entry}
        digest = fields.pop("sha256", None)
        if not _NAME.fullmatch(name) or not isinstance(digest, yaml.ScalarNode) or not _HASH.fullmatch(digest.value):
            raise KeysError(f"{where} is no name with the SHA-256 of a key; grokmesh key makes them")
        if name in names:
            raise KeysError(f"{where} is there twice")
        if digest.value in callers:
            raise KeysError(f"{where} has the key of {callers[digest.value].name}")
        names.add(name)
        callers[digest.value] = _caller(where, name, {field: _value(node) for field, node in fields.items()})
    return callers


def _fields(entry: yaml.MappingNode, where: str) -> dict[str, yaml.Node]:
    fields: dict[str, yaml.Node] = {}
    for key, value in entry.value:
        if key.value in fields:
            raise KeysError(f"{where}: {key.value} is there twice")
        fields[str(key.value)] = value
    return fields


def _value(node: yaml.Node) -> Any:
    """A number, or the texts of a list."""
    if isinstance(node, yaml.SequenceNode):
        return [getattr(item, "value", None) for item in node.value]
    with contextlib.suppress(ValueError):
        return int(node.value) if isinstance(node, yaml.ScalarNode) and node.style is None else node.value
    return node.value


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
