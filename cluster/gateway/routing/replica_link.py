"""The sessions of this gateway that one replica computes."""

from __future__ import annotations

from collections.abc import Callable

from cluster.gateway.session import Session
from cluster.leader_stream import LeaderAddress, LeaderStream
from workers.messages.frames import LeaderInput, LeaderOutput, Refusal, Status
from workers.messages.request import Ahead, Load


class ReplicaLink:
    """What goes over the stream to a replica's leader in one epoch, and the sessions that wait for what comes back."""

    def __init__(self, stream: LeaderStream, on_refused: Callable[[Session, Refusal], None]) -> None:
        self._stream = stream
        self._on_refused = on_refused
        self.sessions: dict[str, Session] = {}

    @property
    def leader(self) -> LeaderAddress:
        return self._stream.leader

    @property
    def load(self) -> Load:
        return self._stream.load

    @property
    def status(self) -> Status:
        """What the leader said about a second ago."""
        return self._stream.status

    @property
    def suspect(self) -> bool:
        """Whether it is being found out if the leader is lost."""
        return self._stream.suspect

    @property
    def trying(self) -> str:
        """The request that the replica computes alone; empty if there is none."""
        return self._stream.trying

    @property
    def others(self) -> tuple[Ahead, ...]:
        """Requests of other gateways on the replica, a second ago at the most."""
        return self.status.others

    @property
    def outstanding(self) -> int:
        """Tokens that the replica has still to compute, for whichever gateway."""
        others = sum(one.tokens - one.generated + (0 if one.generated else one.positions) for one in self.others)
        return sum(session.owed for session in self.sessions.values()) + others

    def submit(self, session: Session) -> None:
        """Sends a session's request; the tokens that it lacks will be delivered to it."""
        self.sessions[session.request.id] = session
        session.replica, session.epoch = self.leader.replica, self.leader.epoch
        self._stream.send(LeaderInput(submit=session.rest()))

    def cancel(self, session: Session) -> None:
        """Forgets a session, here and on the leader, unless it has ended already."""
        if self.sessions.pop(session.request.id, None) is not None:
            self._stream.send(LeaderInput(cancel=session.request.id))

    def abort(self, call: str) -> None:
        """Has the leader end a call's requests, of whichever gateway."""
        self._stream.send(LeaderInput(abort=call))

    async def run(self, on_proven: Callable[[], None]) -> None:
        """Delivers what the leader sends; see `LeaderStream.run`."""
        await self._stream.run(self._deliver, on_proven)

    def close(self) -> list[Session]:
        """Ends the stream; returns the sessions that it leaves behind."""
        self._stream.close()
        left = list(self.sessions.values())
        self.sessions.clear()
        return left

    def _deliver(self, output: LeaderOutput) -> None:
        for scored in output.scores:
            session = self.sessions.get(scored.request_id)
            if session is not None:
                if scored.done:
                    del self.sessions[scored.request_id]
                session.deliver(scored)
        for event in output.tokens:
            session = self.sessions.get(event.request_id)
            if session is not None:
                if event.finish is not None:
                    del self.sessions[event.request_id]
                session.deliver(event)
        for refusal in output.refusals:
            session = self.sessions.pop(refusal.request_id, None)
            if session is not None:
                self._on_refused(session, refusal)
