"""Who is let in: the gateway's certificate, the clients' ones, and what happens when files change."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import datetime
import ipaddress
import pathlib
import ssl
import urllib.request
from collections.abc import AsyncIterator, Awaitable, Callable

import grpc
import grpc.aio
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from cluster.config.reader import load_config
from cluster.config.schema import ConfigError, GatewaySection
from cluster.gateway.auth import reloading
from cluster.gateway.auth.tls import TlsError, server_credentials
from cluster.gateway.openai.server import HttpServer
from grokmesh import Client, Tls
from tests.support.ports import free_port


class _Authority:
    """Signs certificates for 127.0.0.1."""

    def __init__(self, folder: pathlib.Path, name: str) -> None:
        self._folder = folder
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
        self.file = folder / f"{name}.pem"
        self.file.write_bytes(self._sign(self._key, self._name, ca=True))

    def issue(self, name: str) -> tuple[pathlib.Path, pathlib.Path]:
        """Files of a certificate and its key."""
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
        certificate_file, key_file = self._folder / f"{name}.crt", self._folder / f"{name}.key"
        certificate_file.write_bytes(self._sign(key, subject, ca=False))
        key_file.write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            )
        )
        return certificate_file, key_file

    def _sign(self, key: ec.EllipticCurvePrivateKey, subject: x509.Name, *, ca: bool) -> bytes:
        now = datetime.datetime.now(datetime.UTC)
        builder = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self._name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(hours=1))
            .not_valid_after(now + datetime.timedelta(hours=1))
            .add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
            .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), False)
        )
        return builder.sign(self._key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


@dataclasses.dataclass(frozen=True)
class _Grpc:
    """gRPC's door."""

    config: GatewaySection

    @contextlib.asynccontextmanager
    async def open(self) -> AsyncIterator[None]:
        server = grpc.aio.server()
        servicer = health.aio.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
        server.add_secure_port(self.config.address, server_credentials(self.config))
        await servicer.set("", health_pb2.HealthCheckResponse.SERVING)
        await server.start()
        try:
            yield
        finally:
            await server.stop(0)

    def ask(self, tls: Tls | None) -> bool:
        with Client(self.config.address, tls=tls) as client, contextlib.suppress(grpc.RpcError):
            return client.serving(timeout=2)
        return False


@dataclasses.dataclass(frozen=True)
class _Http:
    """HTTP's door."""

    config: GatewaySection

    @contextlib.asynccontextmanager
    async def open(self) -> AsyncIterator[None]:
        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            await Response()(scope, receive, send)

        server = HttpServer(dataclasses.replace(self.config, http_address=self.config.address), app)
        await server.start()
        try:
            yield
        finally:
            await server.stop()

    def ask(self, tls: Tls | None) -> bool:
        context = None
        if tls is not None:
            context = ssl.create_default_context(cafile=tls.ca)
            if tls.certificate is not None:
                context.load_cert_chain(tls.certificate, tls.key)
        url = f"{'http' if tls is None else 'https'}://{self.config.address}/"
        try:
            with urllib.request.urlopen(url, timeout=2, context=context) as answer:
                return int(answer.status) == 200
        except OSError:
            return False


DOORS = pytest.mark.parametrize("kind", [_Grpc, _Http])


def _serving(door: _Grpc | _Http, check: Callable[[], Awaitable[None]]) -> None:
    """Runs `check` while a server with the gateway's certificates listens."""

    async def run() -> None:
        async with door.open():
            await check()

    asyncio.run(run())


async def _gets_in(door: _Grpc | _Http, tls: Tls | None) -> bool:
    return await asyncio.to_thread(door.ask, tls)


def _section(certificate: pathlib.Path, key: pathlib.Path, client_ca: pathlib.Path | None = None) -> GatewaySection:
    address = f"127.0.0.1:{free_port('127.0.0.1')}"
    return GatewaySection(address, tls_certificate=certificate, tls_key=key, tls_client_ca=client_ca)


@DOORS
def test_only_who_trusts_the_signer_gets_in(kind: type[_Grpc | _Http], tmp_path: pathlib.Path) -> None:
    ours, theirs = _Authority(tmp_path, "ours"), _Authority(tmp_path, "theirs")
    door = kind(_section(*ours.issue("gateway")))

    async def check() -> None:
        assert await _gets_in(door, Tls(ours.file))
        assert not await _gets_in(door, Tls(theirs.file))
        assert not await _gets_in(door, None)

    _serving(door, check)


@DOORS
def test_clients_without_a_certificate_of_ours_are_refused(kind: type[_Grpc | _Http], tmp_path: pathlib.Path) -> None:
    ours, theirs = _Authority(tmp_path, "ours"), _Authority(tmp_path, "theirs")
    door = kind(_section(*ours.issue("gateway"), ours.file))

    async def check() -> None:
        assert await _gets_in(door, Tls(ours.file, *ours.issue("alice")))
        assert not await _gets_in(door, Tls(ours.file))
        assert not await _gets_in(door, Tls(ours.file, *theirs.issue("mallory")))

    _serving(door, check)


@DOORS
def test_new_certificates_count_without_a_restart_and_broken_ones_do_not(
    kind: type[_Grpc | _Http], tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reloading, "LOOK_SECONDS", 0.0)
    before, after = _Authority(tmp_path, "before"), _Authority(tmp_path, "after")
    certificate, key = before.issue("gateway")
    door = kind(_section(certificate, key))

    async def check() -> None:
        assert await _gets_in(door, Tls(before.file))
        after.issue("gateway")
        assert await _gets_in(door, Tls(after.file))
        assert not await _gets_in(door, Tls(before.file))
        certificate.write_text("nonsense")
        assert await _gets_in(door, Tls(after.file))

    _serving(door, check)


def test_what_can_not_be_used_is_said_before_anything_starts(tmp_path: pathlib.Path) -> None:
    ours = _Authority(tmp_path, "ours")
    certificate, key = ours.issue("gateway")
    _, other_key = ours.issue("other")
    with pytest.raises(TlsError, match="other"):
        server_credentials(_section(certificate, other_key))
    with pytest.raises(TlsError, match="absent"):
        server_credentials(_section(tmp_path / "absent", key))
    path = tmp_path / "ray_config.yaml"
    path.write_text("model: {name: a, checkpoint: b}\ngateway:\n  tls_key: a\n")
    with pytest.raises(ConfigError, match=r"ray_config\.yaml:2: gateway\.tls_certificate and gateway\.tls_key"):
        load_config(path)
