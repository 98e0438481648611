"""From sessions to leaders and back: one long-lived stream to each ready replica. A session outlives its replica: when that
is lost, another one goes on where it was, or the same one once it is built again."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from cluster.gateway.admission.forecast import Ahead, Capacity, Forecast
from cluster.gateway.errors import Violation, breaking, exhausted, failed, invalid, unavailable
from cluster.gateway.routing.affinity import choose, prefix_key
from cluster.gateway.routing.replica_link import LeaderAddress, ReplicaLink
from cluster.gateway.session import Session
from cluster.telemetry import metrics
from workers.messages.frames import Refusal, RefusalKind, Status
from workers.messages.request import Load

#: Seconds until a session is sent again that a replica could not take, as it had too many.
REFUSED_SECONDS = 0.5
#: Seconds that a forecast wait counts, unless a session is started.
WAIT_SECONDS = 0.02
#: Replicas that may be lost with a session as their only suspect. Else one that breaks them would break all, for ever.
MOST_TRIALS = 2


class Router:
    """Knows the ready replicas and sends each session to the one that likely has its prompt's prefix; see `affinity`.

    While none is ready but one that was lost is being built again, sessions wait for it, at most `max_wait` seconds.
    """

    def __init__(
        self, max_wait: float, on_change: Callable[[int], None] = lambda _: None, silence: float = 1.5
    ) -> None:
        """Leaders that say nothing for `silence` seconds are lost."""
        self._max_wait = max_wait
        self._silence = silence
        self._links: dict[int, ReplicaLink] = {}
        self._lost: set[int] = set()
        self._waiting: dict[str, tuple[Session, asyncio.TimerHandle]] = {}
        # Of those that may be what breaks replicas one runs at a time; the others wait for it to come on or to break another.
        self._trial: Session | None = None
        self._untried: dict[str, tuple[Session, asyncio.TimerHandle]] = {}
        self._on_change = on_change
        self._waits: dict[int, tuple[float, float]] = {}
        #: What requests take, as it turns out.
        self.forecast = Forecast()

    @property
    def ready(self) -> int:
        """Number of replicas that take sessions."""
        return sum(not link.draining for link in self._links.values())

    @property
    def queued(self) -> int:
        """Number of sessions that have no token yet. May be asked by any thread."""
        return sum(not session.tokens for session in self._everywhere())

    def load(self, replica: int) -> Load:
        """A replica's last reported load."""
        link = self._links.get(replica)
        return link.load if link else Load()

    def status(self, replica: int) -> Status:
        """A replica's last reported status."""
        link = self._links.get(replica)
        return link.status if link else Status()

    async def serve(
        self,
        leader: LeaderAddress,
        on_ready: Callable[[], None],
        accept: Callable[[Sequence[float]], bool] = lambda _: True,
    ) -> None:
        """Carries sessions to a replica, once all of its hosts have computed a token, until its stream ends; what is left of
        them goes elsewhere. That token's logarithmic probabilities must be ones that `accept` takes. Raises OSError."""
        link = await ReplicaLink.connect(leader, self._refused, self._proceeded, self._silence)

        def proven() -> None:
            if not accept(link.canary):
                link.abort()
                return
            self._links[leader.replica] = link
            self._lost.discard(leader.replica)
            on_ready()
            self._changed()
            for session, _ in list(self._waiting.values()):
                self._send(session)

        try:
            await link.run(proven)
        finally:
            if self._links.pop(leader.replica, None) is not None and not link.draining:
                self._lost.add(leader.replica)
            left = link.close()
            self._changed()
            known = [session for session in left if session.losses and not session.proceeded]
            for session in left:
                session.lose(alone=known == [session] and session is self._trial)
            tried = self._trial if self._trial in left else None
            if tried is not None:
                self._trial = None
            for session in left:
                if session is tried and session.trials == MOST_TRIALS:
                    session.deliver(breaking(f"{session.losses} replicas were lost with this request; it must be why"))
                    continue
                metrics.SESSIONS_RESUMED.inc()
                self._send(session)
            self._try_next()

    @property
    def sessions(self) -> int:
        """Number of sessions, on replicas or waiting for one."""
        return len(self._everywhere())

    def busy(self, replica: int) -> bool:
        """Whether a replica has sessions."""
        link = self._links.get(replica)
        return link is not None and bool(link.sessions)

    def drain(self, replica: int, *, returns: bool = False) -> None:
        """Sends no more sessions to a replica; those that it has go on. Sessions that find no other wait for it only if it
        returns."""
        (self._lost.add if returns else self._lost.discard)(replica)
        if (link := self._links.get(replica)) is not None:
            link.draining = True
            self._changed()

    def forget(self, replica: int) -> None:
        """No session waits any more for a replica that was lost."""
        self._lost.discard(replica)
        if not self._lost and not self._links:
            for session, _ in list(self._waiting.values()):
                self._send(session)

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
        ahead = (
            Ahead(session.request, session.generated)
            for session in link.sessions.values()
            if session.generated or session.request.priority >= priority  # a session that has tokens keeps its slot
        )
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
        self._leave_trial(session)

    def end(self, reason: str) -> None:
        """Ends all sessions; their clients may go on elsewhere."""
        for session in self._everywhere():
            self.cancel(session)
            session.deliver(unavailable(reason))

    def _everywhere(self) -> list[Session]:
        running = [session for link in list(self._links.values()) for session in list(link.sessions.values())]
        waiting = [session for session, _ in [*self._waiting.values(), *self._untried.values()]]
        return [*running, *waiting]

    def _send(self, session: Session) -> None:
        """Sends a session that is on no replica (any more), or ends it."""
        self._stop_waiting(session)
        if not self._place(session):
            self._leave_trial(session)
            session.deliver(unavailable("the replica was lost, and there is no other"))

    def _least_busy(self) -> ReplicaLink | None:
        """The replica with the least to do; None if none takes sessions."""
        return min(self._open(), key=lambda link: (link.outstanding, link.leader.replica), default=None)

    def _open(self) -> list[ReplicaLink]:
        """The replicas that take sessions; those whose leaders are suspected to be lost only if there are no others."""
        taking = [link for link in self._links.values() if not link.draining]
        return [link for link in taking if not link.suspect] or taking

    def _choose(self, session: Session) -> ReplicaLink | None:
        """The replica that gets a session; None if none takes any."""
        outstanding = {link.leader.replica: link.outstanding for link in self._open()}
        if not outstanding:
            return None
        chosen, cause = choose(prefix_key(session.request.prompt), session.owed, outstanding)
        metrics.ROUTED.labels(cause).inc()
        return self._links[chosen]

    def _proceeded(self, session: Session) -> None:
        """Something has come for a session."""
        if session is self._trial and not (session.suspect and self._on_replica(session)):
            self._leave_trial(session)

    def _on_replica(self, session: Session) -> bool:
        link = self._links.get(session.replica)
        return link is not None and link.sessions.get(session.request.id) is session

    def _leave_trial(self, session: Session) -> None:
        if session is self._trial:
            self._trial = None
            asyncio.get_running_loop().call_soon(self._try_next)  # not within what ends one after the other

    def _try_next(self) -> None:
        while self._trial is None and self._untried:
            self._send(next(iter(self._untried.values()))[0])

    def _place(self, session: Session) -> bool:
        if session.suspect and self._trial not in (None, session):
            timer = asyncio.get_running_loop().call_later(self._max_wait, self._give_up, session)
            self._untried[session.request.id] = session, timer
            return True
        link = self._choose(session)
        if link is None and not self._lost:
            return False
        if session.suspect:
            self._trial = session
        if link is not None:
            link.submit(session)
        else:
            self._wait(session, self._max_wait, self._give_up)
        return True

    def _wait(self, session: Session, seconds: float, then: Callable[[Session], None]) -> None:
        timer = asyncio.get_running_loop().call_later(seconds, then, session)
        self._waiting[session.request.id] = session, timer

    def _stop_waiting(self, session: Session) -> bool:
        for waiting in (self._waiting, self._untried):
            found, timer = waiting.get(session.request.id, (None, None))
            if found is session and timer is not None:
                timer.cancel()
                del waiting[session.request.id]
                return True
        return False

    def _give_up(self, session: Session) -> None:
        self._stop_waiting(session)
        self._leave_trial(session)
        session.deliver(unavailable(f"no replica came back within {self._max_wait:g} s"))

    def _refused(self, session: Session, refusal: Refusal) -> None:
        """A replica did not take a session, or can't go on with it. One that was admitted before is not turned away because
        others were faster."""
        full = refusal.kind is RefusalKind.FULL
        if full and session.losses:
            self._wait(session, REFUSED_SECONDS, self._send)
            return
        self._leave_trial(session)
        if refusal.kind is RefusalKind.FAILED:
            session.deliver(failed(refusal.reason))
        elif full:
            metrics.REJECTIONS.labels("engine_full").inc()
            session.deliver(exhausted(refusal.reason, retry_seconds=1.0))
        else:
            session.deliver(invalid([Violation("completion", refusal.reason)]))

    def _changed(self) -> None:
        metrics.REPLICAS_READY.set(self.ready)
        self._on_change(self.ready)
