"""From sessions to leaders and back: one long-lived stream to each ready replica. A session outlives its replica: when that
is lost, another one goes on where it was, or the same one once it is built again."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable

from cluster.controller.view import ServiceView
from cluster.gateway.admission.forecast import Capacity, Forecast
from cluster.gateway.errors import Violation, breaking, cancelled, exhausted, failed, invalid, unavailable
from cluster.gateway.routing.affinity import choose, prefix_key
from cluster.gateway.routing.replica_link import ReplicaLink
from cluster.gateway.session import Session
from cluster.leader_stream import LeaderAddress, LeaderStream
from cluster.network import REAL, Network
from cluster.telemetry import metrics
from grok.serving.v1 import cluster_pb2
from workers.messages.frames import Refusal, RefusalKind, Status
from workers.messages.request import Ahead, Load, belongs

#: Seconds until a session is sent again that a replica could not take, as it had too many.
REFUSED_SECONDS = 0.5
#: Seconds until a leader whose stream has broken is tried again, if the controller still counts on it.
RECONNECT_SECONDS = 0.2
#: Seconds in which the last words of a leader that is gone may come: which request it computed alone is among them.
LAST_SECONDS = 0.1
#: Seconds that a forecast wait counts, unless a session is started.
WAIT_SECONDS = 0.02
#: Replicas that may be lost while they compute one session alone. Else one that breaks them would break all, for ever; so often
#: hosts are hardly lost just then by chance.
MOST_TRIALS = 3


#: Replicas in these states are not built again.
_GONE = (cluster_pb2.REPLICA_STATE_GIVEN_UP, cluster_pb2.REPLICA_STATE_DRAINING)


class Router:
    """Knows the ready replicas and sends each session to the one that likely has its prompt's prefix; see `affinity`.

    While none is ready but one is being built again, sessions wait for it, at most `max_wait` seconds.
    """

    def __init__(
        self,
        max_wait: float,
        on_change: Callable[[int], None] = lambda _: None,
        silence: float = 1.5,
        numbers: tuple[str | None, ...] = (),
        network: Network = REAL,
    ) -> None:
        """Leaders that send nothing for `silence` seconds are suspected. Replicas must serve a model of these `numbers`, see
        `ModelSpec`, if any are given."""
        self._numbers = numbers
        self._network = network
        self._max_wait = max_wait
        self._silence = silence
        self._links: dict[int, ReplicaLink] = {}
        self._serving: dict[LeaderAddress, asyncio.Task[None]] = {}
        self._ending: set[asyncio.Task[None]] = set()
        #: Whether there is a view yet: before, it is not known what sessions can wait for.
        self._informed = False
        self._served: set[int] = set()
        #: Replicas that sessions may wait for, and leaders that take new ones.
        self._returning: set[int] = set()
        self._taking: set[LeaderAddress] = set()
        self._last_ready = 0
        self._waiting: dict[str, tuple[Session, asyncio.TimerHandle]] = {}
        self._on_change = on_change
        self._waits: dict[int, tuple[float, float]] = {}
        #: What requests take, as it turns out.
        self.forecast = Forecast()

    @property
    def ready(self) -> int:
        """Number of replicas that take sessions."""
        return len(self._links_that_take())

    @property
    def queued(self) -> int:
        """Number of sessions that have no token yet. May be asked by any thread."""
        return sum(not session.tokens for session in self._everywhere())

    @property
    def unplaced(self) -> int:
        """Number of sessions that wait for a replica."""
        return len(self._waiting)

    def follow(self, view: ServiceView) -> None:
        """Keeps a stream to the leader of each replica that serves this gateway's model, and none to others."""
        self._informed = True
        replicas = [replica for replica in view.replicas if self._numbers in ((), replica.numbers)]
        # A controller that has just begun may not know that a replica served before.
        self._served |= {replica.index for replica in replicas if replica.returns or replica.leader is not None}
        served = self._served & {replica.index for replica in replicas if replica.state not in _GONE}
        self._returning = served | {replica.index for replica in replicas if replica.returns}
        leaders = {replica.leader: replica.draining for replica in replicas if replica.leader is not None}
        before, self._taking = self._taking, {leader for leader, draining in leaders.items() if not draining}
        for leader in set(self._serving) - set(leaders):
            task = self._serving.pop(leader)
            self._ending.add(task)
            task.add_done_callback(self._ending.discard)
            asyncio.get_running_loop().call_later(LAST_SECONDS, task.cancel)
        for leader in set(leaders) - set(self._serving):
            self._serving[leader] = asyncio.ensure_future(self._keep(leader))
        self._changed()
        # One that drained goes on after all if the controller that wanted it has died.
        opened = any(link.leader in self._taking - before for link in self._links.values())
        if opened or (not self._links and not self._returning):
            self._send_waiting()

    async def close(self) -> None:
        """Ends all streams."""
        tasks, self._serving = [*self._serving.values(), *self._ending], {}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _keep(self, leader: LeaderAddress) -> None:
        """Carries sessions to a leader, over another stream whenever one has broken, until cancelled."""
        while True:
            with contextlib.suppress(OSError):
                stream = await LeaderStream.connect(leader, self._silence, self._network)
                await self._serve(ReplicaLink(stream, self._refused))
            await asyncio.sleep(RECONNECT_SECONDS)

    async def _serve(self, link: ReplicaLink) -> None:
        """Carries sessions over a stream until it ends; what is left of them goes elsewhere."""
        replica = link.leader.replica

        def proven() -> None:
            self._links[replica] = link
            self._changed()
            self._send_waiting()

        try:
            await link.run(proven)
        finally:
            if self._links.get(replica) is link:
                del self._links[replica]
            left = link.close()
            self._changed()
            self._move(left, link.trying)

    def _move(self, left: list[Session], tried: str) -> None:
        """Sends sessions elsewhere whose replica was lost, which computed the one with the id `tried` alone."""
        for session in left:
            session.lose(alone=session.request.id == tried)
        for session in sorted(left, key=lambda session: session.trials):
            if session.trials == MOST_TRIALS:
                session.deliver(breaking(f"{session.losses} replicas were lost with this request; it must be why"))
                continue
            metrics.SESSIONS_RESUMED.inc()
            self._send(session)

    @property
    def sessions(self) -> int:
        """Number of sessions, on replicas or waiting for one."""
        return len(self._everywhere())

    def wait(self, priority: int) -> float:
        """Seconds that a request of a priority would likely wait for a slot. Not worked out anew for each of those that are
        turned away one after the other."""
        now = asyncio.get_running_loop().time()
        seconds, until = self._waits.get(priority, (0.0, 0.0))
        if now > until:
            seconds = self._wait_now(priority)
            self._waits[priority] = seconds, now + WAIT_SECONDS
        return seconds

    def _wait_now(self, priority: int) -> float:
        link = self._least_busy()
        if link is None:
            return 0.0
        own = (Ahead.of(session.request, session.generated) for session in link.sessions.values())
        # One that has tokens keeps its slot.
        ahead = (one for one in (*own, *link.others) if one.generated or one.priority >= priority)
        return self.forecast.wait(ahead, Capacity(link.load.slots, link.load.positions))

    def start(self, session: Session) -> None:
        """Sends a session to a replica. Raises GatewayError (UNAVAILABLE) when there is none to wait for."""
        self._waits.clear()
        if not self._place(session):
            metrics.REJECTIONS.labels("no_replica").inc()
            raise unavailable("no replica is ready", retry_seconds=2.0)

    def cancel(self, session: Session) -> None:
        """Forgets a session, wherever it is."""
        if not self._stop_waiting(session):
            link = self._links.get(session.replica)
            if link is not None and link.sessions.get(session.request.id) is session:
                link.cancel(session)

    def abort(self, call: str) -> None:
        """Ends a call's sessions, on replicas those of whichever gateway."""
        for link in self._links.values():
            link.abort(call)
        for session in [s for s, _ in self._waiting.values() if belongs(s.request.id, call)]:
            self.cancel(session)
            session.deliver(cancelled())

    @property
    def loads(self) -> list[tuple[int, Load, Status]]:
        """How busy the replicas are that take sessions, by their numbers."""
        links = sorted(self._links_that_take(), key=lambda link: link.leader.replica)
        return [(link.leader.replica, link.load, link.status) for link in links]

    def end(self, reason: str) -> None:
        """Ends all sessions; their clients may go on elsewhere."""
        for session in self._everywhere():
            self.cancel(session)
            session.deliver(unavailable(reason))

    def _everywhere(self) -> list[Session]:
        running = [session for link in list(self._links.values()) for session in list(link.sessions.values())]
        return [*running, *(session for session, _ in self._waiting.values())]

    def _send(self, session: Session) -> None:
        """Sends a session that is on no replica (any more), or ends it."""
        self._stop_waiting(session)
        if not self._place(session):
            session.deliver(unavailable("the replica was lost, and there is no other"))

    def _send_waiting(self) -> None:
        """Sends all that wait for a replica. What may have broken one is tried after the others."""
        for session, _ in sorted(self._waiting.values(), key=lambda entry: entry[0].trials):
            self._send(session)

    def _least_busy(self) -> ReplicaLink | None:
        """The replica with the least to do; None if none takes sessions."""
        return min(self._open(), key=lambda link: (link.outstanding, link.leader.replica), default=None)

    def _open(self) -> list[ReplicaLink]:
        """The replicas that take sessions; those whose leaders are suspected to be lost only if there are no others."""
        taking = self._links_that_take()
        return [link for link in taking if not link.suspect] or taking

    def _links_that_take(self) -> list[ReplicaLink]:
        return [link for link in self._links.values() if link.leader in self._taking]

    def _choose(self, session: Session) -> ReplicaLink | None:
        """The replica that gets a session; None if none takes any."""
        outstanding = {link.leader.replica: link.outstanding for link in self._open()}
        if not outstanding:
            return None
        key = prefix_key(session.request.prompt, session.request.salt)
        chosen, cause = choose(key, session.owed, outstanding)
        metrics.ROUTED.labels(cause).inc()
        return self._links[chosen]

    def _place(self, session: Session) -> bool:
        link = self._choose(session)
        if link is None and self._informed and not self._returning:
            return False
        if link is not None:
            link.submit(session)
        else:
            self._wait(session, self._max_wait, self._give_up)
        return True

    def _wait(self, session: Session, seconds: float, then: Callable[[Session], None]) -> None:
        timer = asyncio.get_running_loop().call_later(seconds, then, session)
        self._waiting[session.request.id] = session, timer

    def _stop_waiting(self, session: Session) -> bool:
        found, timer = self._waiting.get(session.request.id, (None, None))
        if found is not session or timer is None:
            return False
        timer.cancel()
        del self._waiting[session.request.id]
        return True

    def _give_up(self, session: Session) -> None:
        self._stop_waiting(session)
        session.deliver(unavailable(f"no replica came back within {self._max_wait:g} s"))

    def _refused(self, session: Session, refusal: Refusal) -> None:
        """A replica did not take a session, or can't go on with it. One that was admitted before is not turned away because
        others were faster."""
        full = refusal.kind is RefusalKind.FULL
        if full and session.losses:
            self._wait(session, REFUSED_SECONDS, self._send)
            return
        if refusal.kind is RefusalKind.FAILED:
            session.deliver(cancelled() if refusal.cancelled else failed(refusal.reason))
        elif full:
            metrics.REJECTIONS.labels("engine_full").inc()
            session.deliver(exhausted(refusal.reason, retry_seconds=1.0))
        else:
            session.deliver(invalid([Violation("completion", refusal.reason)]))

    def _changed(self) -> None:
        ready = self.ready
        if ready != self._last_ready:
            self._last_ready = ready
            self._on_change(ready)
