"""What crosses between CPU devices of several processes, and what becomes of it when one is lost."""

from __future__ import annotations

import os
import shutil
import socket
import threading
from collections.abc import Callable, Iterator

import pytest

from tools.bench.collectives import Mesh, lose
from workers.host.rendezvous import Introduction, greet
from workers.host.streams import LinkError
from workers.kernels.cpu.collectives import Memory

#: Of what is added up: one piece, and several.
SIZES = (24_576, 2_000_000)
#: Seconds after which all must have noticed a loss.
MOST_SECONDS = 2.0


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("apart", [False, True])
def test_processes_add_up_right(size: int, apart: bool) -> None:
    """Through memory and, in namespaces of their own, over TCP. Each of them compares what it gets."""
    if apart:
        _need_namespaces()
    with Mesh(3, size, programs=50, apart=apart) as mesh:
        assert float(mesh.read(0).split()[0]) > 0


@pytest.mark.parametrize("how", ["kill", "stop", "cut"])
def test_all_others_notice_who_is_lost_while_they_add_up(how: str) -> None:
    if how == "cut":
        _need_namespaces()
    assert lose(1, 3, how, 24_576) < MOST_SECONDS


def _need_namespaces() -> None:
    if os.geteuid() != 0 or not all(map(shutil.which, ("ip", "unshare"))):
        pytest.skip("network namespaces need root, iproute2 and util-linux")


@pytest.fixture
def memory() -> Iterator[Memory]:
    memory = Memory.create(1)
    yield memory
    os.close(memory.file)


Greeting = Callable[..., list[object]]


@pytest.fixture
def greeting(memory: Memory) -> Greeting:
    """Both ends of a connection greet each other, with a secret each: what each finds, or why not."""

    def both(secret: bytes, other: bytes, regions: tuple[int, int] = (1, 1)) -> list[object]:
        found: dict[int, object] = {}

        def end(rank: int, connection: socket.socket, secret: bytes) -> None:
            own = Introduction(
                1, 1, regions[rank], rank, os.getpid(), memory.file, memory.nonce, b"", b"a boot".ljust(36)
            )
            try:
                peer, file = greet(connection, rank == 1, own, secret, 10.0)
                os.close(file)
                found[rank] = peer.rank
            except LinkError as error:
                found[rank] = str(error)
            connection.close()

        with socket.create_server(("127.0.0.1", 0)) as listener:
            connecting = socket.create_connection(listener.getsockname())
            ends = (listener.accept()[0], connecting)
        threads = [
            threading.Thread(target=end, args=(rank, connection, key))
            for rank, (connection, key) in enumerate(zip(ends, (secret, other), strict=True))
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return [found[0], found[1]]

    return both


def test_who_knows_the_secret_is_found(greeting: Greeting) -> None:
    assert greeting(b"of this epoch", b"of this epoch") == [1, 0]


def test_who_does_not_know_the_secret_is_refused(greeting: Greeting) -> None:
    found = greeting(b"of this epoch", b"of the last one")
    assert "it does not know the epoch's secret" in found


def test_processes_that_publish_in_different_ways_refuse_each_other(greeting: Greeting) -> None:
    assert greeting(b"of this epoch", b"of this epoch", (1, 2)) == ["region 2 there, 1 here", "region 1 there, 2 here"]


def test_who_sends_nothing_is_not_waited_for(memory: Memory) -> None:
    own = Introduction(1, 1, 1, 0, os.getpid(), memory.file, memory.nonce, b"", b"a boot".ljust(36))
    with (
        socket.create_server(("127.0.0.1", 0)) as listener,
        socket.create_connection(listener.getsockname()) as silent,
        listener.accept()[0] as accepted,
    ):
        with pytest.raises(LinkError, match="closed"):
            greet(accepted, False, own, b"of this epoch", 0.2)
        assert silent.recv(1)


def test_another_file_than_meant_is_not_taken_for_a_process_s_memory(memory: Memory) -> None:
    mine = memory.open(os.getpid())
    assert mine is not None
    os.close(mine)
    assert Memory(memory.file, b"0" * len(memory.nonce)).open(os.getpid()) is None
    assert Memory(0, memory.nonce).open(os.getpid()) is None
    assert Memory(9999, memory.nonce).open(os.getpid()) is None
