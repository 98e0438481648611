"""How commands reach a running service: its address, TLS, and keys."""

from __future__ import annotations

import argparse
import os
import pathlib
from typing import Any

from cluster import daemon
from grokmesh import DEFAULT_ADDRESS, Client, Tls

#: Environment variable that holds an API key.
API_KEY_VARIABLE = "GROKMESH_API_KEY"


class UsageError(ValueError):
    """A command line that can't be carried out."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of a command that calls a service."""
    parser.add_argument("--address", default=DEFAULT_ADDRESS, help="of the gateway (default: %(default)s)")
    parser.add_argument(
        "--tls-ca", type=pathlib.Path, help="PEM file of the authority that signed its certificate; then TLS is spoken"
    )
    parser.add_argument(
        "--tls-certificate", type=pathlib.Path, help="PEM file of your own certificate, if it wants one"
    )
    parser.add_argument("--tls-key", type=pathlib.Path, help="PEM file of its key")


def options(arguments: argparse.Namespace) -> dict[str, Any]:
    """How a client gets access, as Client takes it: with the key of the environment, or one's own service's."""
    files = (arguments.tls_ca, arguments.tls_certificate, arguments.tls_key)
    key = os.environ.get(API_KEY_VARIABLE) or daemon.admin_key(arguments.address)
    return {"api_key": key, "tls": Tls(*files) if any(files) else None}


def client(arguments: argparse.Namespace, **others: Any) -> Client:
    """A client of the service. Raises ClientError."""
    return Client(arguments.address, **options(arguments), **others)
