"""Sessions and replicas, with leaders that are played: who is lost, who is silent, who comes back."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import struct
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc
import pytest

from cluster.controller.view import ReplicaView, ServiceView
from cluster.gateway.errors import GatewayError
from cluster.gateway.routing.router import MOST_TRIALS, Router
from cluster.gateway.session import Session
from cluster.gateway.stop import StopTexts
from cluster.leader_stream import LeaderAddress
from grok.serving.v1 import cluster_pb2
from tests.conftest import DEMO
from workers.host import liveness
from workers.host.streams import PULSE_SECONDS
from workers.messages.codec import decode, encode
from workers.messages.frames import Hello, LeaderInput, LeaderOutput, Refusal, RefusalKind
from workers.messages.plan import Sampling, Token
from workers.messages.request import Finish, Load, Request, TokenEvent
from workers.text.tokenizer import Tokenizer

SILENCE_SECONDS = 1.5
TOKENIZER = Tokenizer(DEMO / "tokenizer.model")


class _Leader:
    """Plays a leader to one gateway."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, epoch: int) -> None:
        self._reader, self._writer, self._epoch = reader, writer, epoch

    async def submitted(self) -> Request:
        message = await self.hear()
        assert message.submit is not None
        return message.submit

    async def hear(self) -> LeaderInput:
        while (message := decode(LeaderInput, await self.frame())) == LeaderInput():
            pass  # it lives
        return message

    async def frame(self) -> bytes:
        (length,) = struct.unpack(">I", await self._reader.readexactly(4))
        return await self._reader.readexactly(length)

    def say(self, **parts: Any) -> None:
        frame = encode(LeaderOutput(self._epoch, **parts))
        self._writer.write(struct.pack(">I", len(frame)) + frame)

    def draw(self, *ids: int, last: bool = False, name: str = "r") -> None:
        events = [TokenEvent(name, Token(id, -0.5, ()), None) for id in ids]
        if last:
            events[-1] = TokenEvent(name, events[-1].token, Finish.LENGTH)
        self.say(tokens=tuple(events))

    def die(self) -> None:
        self._writer.transport.abort()


class _Router(Router):
    """Follows a view that tests change a replica at a time."""

    def __init__(self, max_wait: float, silence: float = SILENCE_SECONDS) -> None:
        super().__init__(max_wait, silence=silence)
        self._views: dict[int, ReplicaView] = {}

    def show(self, view: ReplicaView) -> None:
        """Follows a view in which this replica has changed."""
        self._views[view.index] = view
        self.follow(ServiceView(tuple(self._views.values()), len(self._views)))


async def _turns() -> None:
    """Lets everything happen that waits for nothing but the loop."""
    for _ in range(100):
        await asyncio.sleep(0)


@contextlib.asynccontextmanager
async def _leading(router: _Router, replica: int, epoch: int) -> AsyncIterator[_Leader]:
    """A replica that has become ready."""
    joined: asyncio.Queue[_Leader] = asyncio.Queue()
    server = await asyncio.start_server(lambda r, w: joined.put_nowait(_Leader(r, w, epoch)), "127.0.0.1", 0)
    host, port = server.sockets[0].getsockname()
    ready = router.ready
    view = ReplicaView(replica, cluster_pb2.REPLICA_STATE_READY, epoch, returns=True)
    router.show(dataclasses.replace(view, leader=LeaderAddress(replica, epoch, f"{host}:{port}", b"s")))
    leader = await joined.get()
    assert decode(Hello, await leader.frame()).epoch == epoch
    leader.say()
    await _turns()
    assert router.ready == ready, "that it lives is not enough"
    leader.say(load=Load())
    while router.ready == ready:
        await asyncio.sleep(0.001)
    try:
        yield leader
    finally:
        leader.die()
        router.show(view)
        server.close()
        while not joined.empty():  # the router has tried again
            joined.get_nowait().die()
        await asyncio.sleep(0.01)  # sockets are closed in the loop's next turn


def _session(name: str = "r") -> Session:
    return Session(Request(name, (5, 6), 6, Sampling(seed=1)), StopTexts.of(()), TOKENIZER)


def _resumed(message: LeaderInput) -> list[int]:
    assert message.submit is not None
    assert list(message.submit.prompt) == [5, 6]
    return list(message.submit.resumed)


async def _ids(session: Session) -> list[int]:
    ids: list[int] = []
    while session.finish is None:
        ids += [delta.token.id for delta in await session.next_deltas() if delta.token is not None]
    return ids


def test_a_session_goes_on_at_another_replica_with_what_it_has() -> None:
    async def play() -> None:
        router, session = _Router(max_wait=5), _session()
        async with _leading(router, 0, 1) as first, _leading(router, 1, 1) as second:
            router.start(session)
            assert _resumed(await first.hear()) == []
            first.draw(10, 11)
            await session.next_deltas()
            first.draw(12)
            while session.generated < 3:
                await asyncio.sleep(0)
            first.die()
            assert _resumed(await second.hear()) == [10, 11, 12]  # the last one has not been told to the client
            second.draw(13, 14, 15, last=True)
            assert await _ids(session) == [12, 13, 14, 15]
            assert (session.replica, session.epoch) == (1, 1)

    asyncio.run(play())


@pytest.mark.parametrize("end", [_Leader.die, lambda leader: None], ids=["dead", "silent"])
def test_sessions_wait_for_a_replica_that_is_built_again(end: Callable[[_Leader], None]) -> None:
    async def play() -> None:
        router, session = _Router(max_wait=5), _session()
        async with _leading(router, 0, 1) as first:
            router.start(session)
            first.draw(10)
            end(first)
            async with asyncio.timeout(SILENCE_SECONDS + 1):
                while router.ready:
                    await asyncio.sleep(0.01)
        late = Session(Request("late", (5, 6), 6, Sampling()), StopTexts.of(()), TOKENIZER)
        router.start(late)
        cancelled = Session(Request("cancelled", (5, 6), 6, Sampling()), StopTexts.of(()), TOKENIZER)
        router.start(cancelled)
        assert router.sessions == 3
        router.cancel(cancelled)
        async with _leading(router, 0, 2) as again:
            assert _resumed(await again.hear()) == [10]
            assert (await again.submitted()).id == "late"
            again.draw(11, 12, 13, 14, 15, last=True)
            assert await _ids(session) == [10, 11, 12, 13, 14, 15]
            router.cancel(late)
            assert (await again.hear()).cancel == "late"
        assert router.sessions == 0

    asyncio.run(play())


def test_a_session_that_waits_gets_the_replica_that_drained_and_goes_on_after_all() -> None:
    async def play() -> None:
        router, session = _Router(max_wait=5), _session()
        async with _leading(router, 0, 1) as leader:
            serving = router._views[0]
            router.show(dataclasses.replace(serving, draining=True))
            router.start(session)
            assert router.unplaced == 1
            router.show(serving)  # as a new controller does
            assert (await leader.submitted()).id == "r"
            router.cancel(session)

    asyncio.run(play())


def test_a_leader_that_says_that_it_lives_is_believed() -> None:
    async def play() -> None:
        router = _Router(max_wait=5)
        async with _leading(router, 0, 1) as leader:
            for _ in range(int(2 * SILENCE_SECONDS / PULSE_SECONDS)):
                leader.say()
                await asyncio.sleep(PULSE_SECONDS)
            assert router.ready == 1

    asyncio.run(play())


def test_a_leader_that_is_suspected_gets_no_sessions_and_keeps_those_that_it_has(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    looks: list[float] = []
    monkeypatch.setattr(liveness, "why_lost", lambda address, silent, confirm: looks.append(silent))

    async def play() -> None:
        router, kept, new = _Router(max_wait=5, silence=0.5), _session(), _session("new")
        async with _leading(router, 0, 1) as silent, _leading(router, 1, 1) as other:
            router.start(kept)
            assert (await silent.submitted()).id == "r"
            while not looks:
                other.say()
                await asyncio.sleep(0.05)
            router.start(new)
            assert (await other.submitted()).id == "new"
            silent.draw(1, 2, 3, 4, 5, 6, last=True)
            assert await _ids(kept) == [1, 2, 3, 4, 5, 6]
            assert kept.losses == 0

    asyncio.run(play())


def test_a_wait_ends() -> None:
    async def play() -> None:
        router, session = _Router(max_wait=0.1), _session()
        async with _leading(router, 0, 1):
            router.start(session)
        with pytest.raises(GatewayError, match="no replica came back within"):
            await _ids(session)
        assert router.sessions == 0

    asyncio.run(play())


def test_who_was_admitted_is_not_turned_away_by_a_full_replica() -> None:
    async def play() -> None:
        router, session, newcomer = _Router(max_wait=5), _session(), _session()
        async with _leading(router, 0, 1) as first, _leading(router, 1, 1) as second:
            router.start(session)
            first.draw(10)
            await session.next_deltas()
            first.die()
            full = (Refusal("r", "full", RefusalKind.FULL),)
            assert _resumed(await second.hear()) == [10]
            second.say(refusals=full)
            assert _resumed(await second.hear()) == [10]  # again, a little later
            second.draw(11, 12, 13, 14, 15, last=True)
            assert await _ids(session) == [11, 12, 13, 14, 15]
            router.start(newcomer)
            await second.hear()
            second.say(refusals=full)
            with pytest.raises(GatewayError, match="full"):
                await _ids(newcomer)

    asyncio.run(play())


def test_a_session_that_breaks_every_replica_breaks_no_more_and_takes_no_others_with_it() -> None:
    """One of 16 breaks whatever computes it. All are lost with it twice. Then all are on trial, and each is computed alone."""

    async def play() -> None:
        router, guilty = _Router(max_wait=5), "s7"
        sessions = {
            name: Session(Request(name, (5, 6), 20, Sampling()), StopTexts.of(()), TOKENIZER)
            for name in (f"s{i}" for i in range(16))
        }
        for session in sessions.values():
            router.start(session)
        for epoch in range(2):
            async with _leading(router, 0, epoch) as leader:
                assert not any([(await leader.submitted()).trial for _ in sessions])
        reading = {name: asyncio.ensure_future(_ids(session)) for name, session in sessions.items()}
        for epoch in range(2, 2 + MOST_TRIALS):
            assert not reading[guilty].done()
            async with _leading(router, 0, epoch) as leader:
                while (request := await leader.submitted()).id != guilty:
                    assert request.trial is (not request.resumed), "it is over once some tokens have come"
                    leader.say(trying=request.id if request.trial else "")
                    leader.draw(*[9] * 10, last=bool(request.resumed), name=request.id)
                leader.say(trying=guilty)
                await asyncio.sleep(0.01)
        with pytest.raises(GatewayError, match="it must be why") as raised:
            await reading.pop(guilty)
        assert raised.value.code is grpc.StatusCode.INTERNAL, "clients must not send it again"
        async with _leading(router, 0, epoch + 1) as leader:
            while not all(task.done() for task in reading.values()):
                with contextlib.suppress(TimeoutError):
                    request = await asyncio.wait_for(leader.submitted(), 0.1)
                    leader.draw(*[9] * (20 - len(request.resumed)), last=True, name=request.id)
        for task in reading.values():
            assert await task == [9] * 20
        assert router.sessions == 0

    asyncio.run(asyncio.wait_for(play(), 30))


def test_what_may_have_broken_a_replica_is_tried_after_the_others() -> None:
    async def play() -> None:
        router = _Router(max_wait=5)
        async with _leading(router, 0, 1) as leader:
            for name in ("suspect", "other"):
                router.start(_session(name))
                assert (await leader.submitted()).id == name
            leader.say(trying="suspect")
            while router._links[0].trying != "suspect":
                await asyncio.sleep(0.001)
            async with _leading(router, 1, 1) as second:
                leader.die()
                assert [(await second.submitted()).id for _ in range(2)] == ["other", "suspect"]
                router.end("it is over")

    asyncio.run(play())


def test_without_any_replica_there_is_nothing_to_wait_for() -> None:
    async def play() -> None:
        router = _Router(max_wait=5)
        early = _session()
        router.start(early)  # nothing is known yet
        assert router.unplaced == 1
        router.follow(ServiceView())
        with pytest.raises(GatewayError, match="there is no other"):
            await early.next_deltas()
        with pytest.raises(GatewayError, match="no replica is ready"):
            router.start(_session())
        async with _leading(router, 0, 1):
            pass
        router.show(ReplicaView(0, cluster_pb2.REPLICA_STATE_GIVEN_UP, 1))
        with pytest.raises(GatewayError, match="no replica is ready"):
            router.start(_session())

    asyncio.run(play())
