"""A follower's loop: plans in, in their order, a few ahead of the devices."""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
import time

from workers.host.streams import PULSE_SECONDS, Link, LinkError
from workers.messages.codec import decode, encode
from workers.messages.frames import Done, PlanFrame
from workers.runtime.profiler import Profiler
from workers.runtime.runtime import Pending, Runtime
from workers.telemetry import metrics

_LOG = logging.getLogger(__name__)

#: Every so many plans all hosts take the time of a collective.
PROBE_EVERY = 64


def follow(runtime: Runtime, link: Link, epoch: int, profiler: Profiler) -> None:
    """A follower's loop: carries out plans as they come, a few ahead of the devices, and reports when they are done.
    Returns when the leader ends, and when its own devices fail: other ranks' devices then fail too, and which one was the first
    is for the leader to say, whose streams end in that order.

    Raises:
      LinkError: the stream broke, or a plan of another epoch or out of order came.
      CodecError: what came is no plan.
    """
    finished: queue.Queue[Pending] = queue.Queue(maxsize=1)
    threading.Thread(target=_tell_done, args=(runtime, link, finished), daemon=True, name="follower-done").start()
    threading.Thread(target=_pulse, args=(link,), daemon=True, name="follower-pulse").start()
    expected = 1
    while (frame := link.receive()) is not None:
        message = decode(PlanFrame, frame)
        if (message.epoch, message.plan.number) != (epoch, expected):
            raise LinkError(f"plan {message.plan.number} of epoch {message.epoch} came; {expected} of {epoch} is due")
        expected += 1
        profiler.step()
        pending = runtime.execute(message.plan)
        metrics.PLANS.inc()
        finished.put(pending)
        probe(runtime, pending)


def _pulse(link: Link) -> None:
    """Sends the leader signs of life."""
    with contextlib.suppress(LinkError):
        while True:
            link.send(encode(Done(0, time.process_time())))
            time.sleep(PULSE_SECONDS)


def _tell_done(runtime: Runtime, link: Link, finished: queue.Queue[Pending]) -> None:
    try:
        while True:
            pending = finished.get()
            runtime.wait(pending)
            link.send(encode(Done(pending.plan.number, time.process_time())))
    except Exception as error:  # of the devices or the stream: the loop must end, and not be stuck behind a full queue
        _LOG.error("a plan could not be finished: %s", error)
        link.close()
        while True:
            finished.get()


def probe(runtime: Runtime, pending: Pending) -> None:
    """Takes the time of a collective, on every host after the same plans."""
    if pending.plan.number % PROBE_EVERY == 0:
        runtime.wait(pending)
        metrics.COLLECTIVE_SECONDS.observe(runtime.probe())
