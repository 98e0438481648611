"""The Ray actor, one a host."""

from __future__ import annotations

import os

import prometheus_client
import ray

from workers import logs, metrics
from workers.assignment import Assignment, Endpoint, Progress
from workers.link import free_port
from workers.worker import Worker


@ray.remote
class Host:
    """A worker process under Ray's care. Calls may overlap: `progress` answers while another call computes."""

    def __init__(self) -> None:
        self._worker: Worker | None = None
        self._address = ray.util.get_node_ip_address()
        server, _ = prometheus_client.start_http_server(0, self._address, registry=metrics.REGISTRY)
        self._metrics_port = server.server_port

    def endpoint(self) -> Endpoint:
        """Where this host can be reached."""
        return Endpoint(
            address=self._address,
            pid=os.getpid(),
            coordinator_port=free_port(self._address),
            leader_port=free_port(self._address),
            metrics_port=self._metrics_port,
        )

    def form(self, assignment: Assignment) -> None:
        """See `Worker.form`."""
        logs.configure(replica=assignment.replica, epoch=assignment.epoch, rank=assignment.rank)
        self._worker = Worker(assignment)
        self._worker.form()

    def warm_up(self) -> None:
        """See `Worker.warm_up`."""
        assert self._worker is not None
        self._worker.warm_up()

    def serve(self) -> None:
        """See `Worker.serve`."""
        assert self._worker is not None
        self._worker.serve()

    def profile(self, steps: int, seconds: float) -> dict[str, bytes]:
        """See `Profiler.trace`."""
        assert self._worker is not None
        return self._worker.profiler.trace(steps, seconds)

    def progress(self) -> Progress:
        """What the worker is doing."""
        return self._worker.progress if self._worker else Progress("starting", 0.0)
