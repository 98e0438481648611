"""The streams of a replica admit who knows the secret, keep order, and end cleanly."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator

import pytest

from tests.support.ports import free_port
from tests.support.waiting import wait_until
from workers.host import streams
from workers.host.streams import MAX_FRAME, LeaderServer, Link, LinkError, connect
from workers.messages.codec import decode, encode
from workers.messages.frames import PROTOCOL, Done, Hello, LeaderInput, LeaderOutput, PlanFrame
from workers.messages.plan import DecodeRow, Plan
from workers.telemetry import metrics

SILENCE_SECONDS = 1.5
SECRET = b"a secret of the epoch"


@contextlib.contextmanager
def _server(silence: float = SILENCE_SECONDS) -> Iterator[tuple[LeaderServer, str]]:
    address = f"127.0.0.1:{free_port('127.0.0.1')}"
    server = LeaderServer(address, epoch=3, secret=SECRET, silence=silence)
    try:
        yield server, address
    finally:
        server.close()


def _hello(epoch: int = 3, secret: bytes = SECRET, rank: int | None = None) -> Hello:
    return Hello(epoch, secret, rank)


def test_plans_reach_every_follower_in_order() -> None:
    with _server() as (server, address):
        followers = [connect(address, _hello(rank=rank), 5) for rank in (1, 2)]
        server.wait_for_followers(2, 5)
        for number in range(1, 200):
            server.broadcast(Plan(number, (), (), tuple(DecodeRow(slot, 7) for slot in range(number))))
        for follower in followers:
            frames = [follower.receive() for _ in range(1, 200)]
            assert [decode(PlanFrame, frame or b"").plan.number for frame in frames] == list(range(1, 200))
            follower.close()


def test_the_leader_knows_how_far_a_follower_is() -> None:
    def lag() -> float | None:
        return metrics.LEADER.get_sample_value("grokmesh_mesh_plan_lag", {"follower": "5"})

    with _server() as (server, address):
        link = connect(address, _hello(rank=5), 5)
        server.wait_for_followers(1, 5)
        for number in (1, 2, 3):
            server.broadcast(Plan(number, (), (), ()))
        assert lag() == 3
        link.send(encode(Done(2)))
        deadline = time.monotonic() + 5
        while lag() != 1:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert metrics.LEADER.get_sample_value("grokmesh_mesh_plan_seconds_count", {"follower": "5"}) == 1
        link.close()


def test_a_gateway_is_heard_and_answered() -> None:
    with _server() as (server, address):
        link = connect(address, _hello(), 5)
        incoming = server.inbox.get(timeout=5)
        assert incoming is not None
        gateway, joined = incoming
        assert gateway is not None
        assert joined == LeaderInput()
        cancel = LeaderInput(cancel="x")
        link.send(encode(cancel))
        assert server.inbox.get(timeout=5) == (gateway, cancel)
        gateway.send(LeaderOutput(3))
        assert decode(LeaderOutput, link.receive() or b"").epoch == 3
        link.close()
        assert server.inbox.get(timeout=5) == (gateway, None)


@pytest.mark.parametrize(
    "hello",
    [
        _hello(epoch=2),
        _hello(secret=b"guess"),
        _hello(secret=b""),
        _hello(2, SECRET, 1),
        Hello(3, SECRET, protocol=PROTOCOL + 1),
    ],
)
def test_who_does_not_know_epoch_and_secret_is_turned_away(hello: Hello) -> None:
    with _server() as (server, address):
        link = connect(address, hello, 5)
        with contextlib.suppress(LinkError):
            assert link.receive() is None
        assert server.inbox.empty()
        with pytest.raises(LinkError, match="0 of 1 followers joined"):
            server.wait_for_followers(1, 0.1)
        link.close()


@pytest.mark.parametrize("garbage", [b"GET / HTTP/1.1\r\n\r\n", b"\xff" * 64, b"\x00\x00\x00\x05hello", b""])
def test_garbage_disturbs_nobody(garbage: bytes) -> None:
    with _server() as (server, address):
        host, port = address.split(":")
        with socket.create_connection((host, int(port))) as stranger:
            stranger.sendall(garbage)
        follower = connect(address, _hello(rank=1), 5)
        server.wait_for_followers(1, 5)
        server.broadcast(Plan(1, (), (), ()))
        assert follower.receive() is not None
        follower.close()


@pytest.mark.parametrize("silent", [True, False])
def test_a_follower_that_is_lost_or_silent_ends_all_streams(silent: bool) -> None:
    with _server() as (server, address):
        gateway = connect(address, _hello(), 5)
        assert server.inbox.get(timeout=5) is not None
        follower = connect(address, _hello(rank=1), 5)
        server.wait_for_followers(1, 5)
        began = time.monotonic()
        if not silent:
            follower.close()
        while server.inbox.get(timeout=5) is not None:
            pass
        assert time.monotonic() - began < SILENCE_SECONDS + 0.5
        with pytest.raises(LinkError, match="follower 1 ") as raised:
            server.broadcast(Plan(1, (), (), ()))
        assert raised.value.rank == 1, "so that its host can be blamed"
        with contextlib.suppress(LinkError):
            while gateway.receive() is not None:
                pass
        gateway.close()
        follower.close()


def test_a_follower_that_is_silent_but_lives_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    dead = threading.Event()

    def lives(address: str, silent: float) -> str | None:
        asked.append(address)
        return "its process is stopped" if dead.is_set() else None

    monkeypatch.setattr(streams, "why_lost", lives)
    with _server(silence=0.1) as (server, address):
        follower = connect(address, Hello(3, SECRET, 1, liveness="10.0.0.1:7"), 5)
        server.wait_for_followers(1, 5)
        wait_until(server.late, 5)
        follower.send(encode(Done(0)))
        wait_until(lambda: not server.late(), 5)
        dead.set()
        while server.inbox.get(timeout=5) is not None:
            pass
        with pytest.raises(LinkError, match="follower 1 is lost: its process is stopped"):
            server.broadcast(Plan(1, (), (), ()))
        assert server.failure is server.broken
        assert set(asked) == {"10.0.0.1:7"}
        follower.close()


def test_a_gateway_hears_that_the_leader_lives() -> None:
    with _server() as (_, address):
        gateway = connect(address, _hello(), 5)
        gateway.settimeout(SILENCE_SECONDS)
        for _ in range(3):
            assert decode(LeaderOutput, gateway.receive() or b"").load is None
        gateway.close()


def test_a_frame_that_is_too_long_is_refused() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener, socket.create_connection(listener.getsockname()) as theirs:
        link = Link(listener.accept()[0])
        theirs.sendall((MAX_FRAME + 1).to_bytes(4, "big"))
        with pytest.raises(LinkError, match="a frame of"):
            link.receive()
        link.close()
