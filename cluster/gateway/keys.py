"""API keys: the file holds names and hashes, clients send `authorization: Bearer KEY`."""

from __future__ import annotations

import hashlib
import pathlib
import re
import secrets
from collections.abc import Iterable

import grpc
import yaml

from cluster.gateway.errors import GatewayError

#: The name of callers where no keys are asked for.
ANONYMOUS = "anonymous"

_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")
_HASH = re.compile(r"[0-9a-f]{64}")


class KeysError(ValueError):
    """A file of keys that can't be used."""


def new_key(name: str) -> tuple[str, str]:
    """A new key and the line for the file. Raises KeysError if the name is not one."""
    if not _NAME.fullmatch(name):
        raise KeysError(f"{name!r} is no name for a key: use lower-case letters, digits, '.', '_' and '-'")
    key = f"gm-{secrets.token_urlsafe(32)}"
    return key, f"{name}: {_digest(key)}"


class Keys:
    """Who may call. A key has 256 random bits, so its plain SHA-256 can't be turned back."""

    def __init__(self, names: dict[str, str]) -> None:
        self._names = names

    @classmethod
    def load(cls, path: pathlib.Path | None) -> Keys | None:
        """The keys of a file, None without one. Raises KeysError, which names file and entry."""
        if path is None:
            return None
        try:
            entries = yaml.safe_load(path.read_text())
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise KeysError(f"{path}: {error}") from error
        if not isinstance(entries, dict) or not entries:
            raise KeysError(f"{path}: must hold lines of `name: SHA-256 of the key`; grokmesh key makes them")
        for name, digest in entries.items():
            if not _NAME.fullmatch(str(name)) or not _HASH.fullmatch(str(digest)):
                raise KeysError(f"{path}: {name} is no name with the SHA-256 of a key; grokmesh key makes them")
        return cls({str(digest): str(name) for name, digest in entries.items()})

    def caller(self, metadata: Iterable[tuple[str, str | bytes]]) -> str:
        """The name of the key that a call brings. Raises GatewayError (UNAUTHENTICATED)."""
        header = next((value for key, value in metadata if key == "authorization"), "")
        kind, _, key = str(header).partition(" ")
        # Looking the hash up leaks no more by its timing than how much of a hash agrees, which leads to no key.
        name = self._names.get(_digest(key.strip())) if kind.lower() == "bearer" else None
        if name is None:
            raise GatewayError(
                grpc.StatusCode.UNAUTHENTICATED,
                "UNKNOWN_KEY",
                "this service wants an API key: send `authorization: Bearer KEY`",
            )
        return name


def _digest(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()
