"""Certificates of the gateway."""

from __future__ import annotations

import pathlib
import ssl
from collections.abc import Callable
from typing import Any, TypeVar

import grpc

from cluster.config.schema import GatewaySection
from cluster.gateway.auth.reloading import Reloading

Content = TypeVar("Content")


class TlsError(ValueError):
    """Certificates that can't be used."""


def server_credentials(config: GatewaySection) -> grpc.ServerCredentials:
    """Credentials that look with each new connection whether the files have changed. Raises TlsError, which names them."""
    reloading = _reloading(config, _read)
    known = reloading.get()

    def changed() -> Any:  # None for no change, which gRPC's types omit
        nonlocal known
        before, known = known, reloading.get()
        return None if known is before else known

    wanted = config.tls_client_ca is not None
    return grpc.dynamic_ssl_server_credentials(known, changed, require_client_authentication=wanted)


def http_context(config: GatewaySection) -> ssl.SSLContext:
    """The same for HTTP: each handshake has what the files say then. Raises TlsError, which names them."""
    reloading = _reloading(config, _read_context)

    def renew(connection: ssl.SSLObject | ssl.SSLSocket, *_: object) -> None:
        connection.context = reloading.get()

    context = reloading.get()
    context.sni_callback = renew
    return context


def _reloading(
    config: GatewaySection, read: Callable[[pathlib.Path, pathlib.Path, pathlib.Path | None], Content]
) -> Reloading[Content]:
    """What `read` makes of the files of certificate, key and clients' authority, if there is one."""
    certificate, key, client_ca = config.tls_certificate, config.tls_key, config.tls_client_ca
    assert certificate is not None
    assert key is not None
    files = (certificate, key, *([client_ca] if client_ca is not None else []))
    return Reloading(files, lambda: read(certificate, key, client_ca), TlsError)


def _read_context(certificate: pathlib.Path, key: pathlib.Path, client_ca: pathlib.Path | None) -> ssl.SSLContext:
    _read(certificate, key, client_ca)
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificate, key)
    if client_ca is not None:
        context.load_verify_locations(client_ca)
        context.verify_mode = ssl.CERT_REQUIRED
    return context


def _read(
    certificate: pathlib.Path, key: pathlib.Path, client_ca: pathlib.Path | None
) -> grpc.ServerCertificateConfiguration:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        # gRPC would take anything, and then fail with each connection.
        context.load_cert_chain(certificate, key)
        if client_ca is not None:
            context.load_verify_locations(client_ca)
        roots = client_ca.read_bytes() if client_ca is not None else None
        return grpc.ssl_server_certificate_configuration([(key.read_bytes(), certificate.read_bytes())], roots)
    except (OSError, ssl.SSLError) as error:
        shown = ", ".join(str(file) for file in (certificate, key, client_ca) if file is not None)
        raise TlsError(f"{shown}: {error}") from error
