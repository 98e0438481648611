"""The Ray actor, one a host."""

from __future__ import annotations

import concurrent.futures
import contextlib
import faulthandler
import logging
import os
import pathlib
import signal
import socket
import threading
import time
from typing import TYPE_CHECKING

import ray

from workers.checkpoint.cache_keeper import start_keeper
from workers.host import liveness
from workers.host.code_digest import code_digest
from workers.host.environment import settle
from workers.host.streams import free_port
from workers.host.weights_server import WeightsServer
from workers.host.worker import Worker
from workers.messages.specs import Assignment, Endpoint, EngineSpec, MeshSpec, ModelSpec, Progress, RankSpec
from workers.telemetry import logs, metrics
from workers.telemetry.metrics_server import serve_metrics

if TYPE_CHECKING:
    from workers.host.standby import StandbyEngine

_LOG = logging.getLogger(__name__)

#: Of workers' metrics. The policy of deploy/kuberay/common.yaml lets Prometheus in there.
METRICS_PORTS = range(9500, 9564)
#: Seconds that a connection to another host may take.
_REACH_SECONDS = 3.0
#: How often a worker looks whether Ray's node is still there. Ray itself looks every second.
_ORPHAN_SECONDS = 0.1
#: The variables by which Ray assigns accelerators to a process.
_ACCELERATORS = ("CUDA_VISIBLE_DEVICES", "TPU_VISIBLE_CHIPS", "TPU_CHIPS_PER_HOST_BOUNDS", "TPU_HOST_BOUNDS")


@ray.remote
class Host:
    """A worker process under Ray's care. Calls may overlap: `progress` answers while another call computes."""

    def __init__(self) -> None:
        self._worker: Worker | None = None
        self._standby: StandbyEngine | None = None
        self._prepared: object = None
        self._spec: RankSpec | None = None
        self._digests: dict[str, int] = {}
        self._failure: Exception | None = None
        self._serving = False
        self._preparing = threading.Lock()
        self._traces: dict[str, dict[str, bytes]] = {}
        self._address = ray.util.get_node_ip_address()
        faulthandler.register(signal.SIGUSR1)
        threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True, name="orphan").start()
        self._liveness = liveness.start_server(self._address)
        self._weights: WeightsServer | None = None
        # Any port is better than none.
        self._metrics_port = serve_metrics(self._address, (*METRICS_PORTS, 0), metrics.REGISTRY).server_port

    def endpoint(self, weights_cache: str | None = None) -> Endpoint:
        """Where this host can be reached, and its weights cache be read, if it has one."""
        if weights_cache and self._weights is None:
            self._weights = WeightsServer(self._address, pathlib.Path(weights_cache))
            self._weights.serve_in_background("weights")
            start_keeper(weights_cache)
        return self._endpoint()

    def _endpoint(self) -> Endpoint:
        return Endpoint(
            address=self._address,
            pid=os.getpid(),
            node=ray.get_runtime_context().get_node_id(),
            coordinator_port=free_port(self._address),
            leader_port=free_port(self._address),
            metrics_port=self._metrics_port,
            code=code_digest(),
            liveness=self._liveness,
            weights=self._weights.address_for_twins if self._weights else None,
            accelerators={name: os.environ[name] for name in _ACCELERATORS if name in os.environ},
        )

    def unreachable(self, places: list[tuple[str, int]]) -> list[int]:
        """Which of these addresses and ports, by their index, can't be connected to from here."""
        with concurrent.futures.ThreadPoolExecutor(len(places)) as pool:
            return [i for i, reached in enumerate(pool.map(_reaches, places)) if not reached]

    def prepare(self, model: ModelSpec, mesh: MeshSpec, engine: EngineSpec) -> None:
        """Stands by for this, unless it does already: does all that can be done before a place is free."""
        with self._preparing:
            if self._prepared == (model, mesh, engine):
                return
            settle(os.environ)
            from workers.host.standby import StandbyEngine

            self._standby = StandbyEngine(model, mesh, engine)
            self._standby.trace()
            self._prepared = model, mesh, engine

    def replace(self, before: Endpoint | None) -> None:
        """Takes a place: of the worker that was here `before`, which it ends, and whose accelerators it then has; else one with
        all accelerators of this host."""
        for name in _ACCELERATORS:
            os.environ.pop(name, None)  # Ray has given it none
        if before is not None:
            _end(before.pid)
            os.environ.update(before.accelerators)

    def form(self, spec: RankSpec) -> dict[str, int]:
        logs.configure(replica=spec.replica, epoch=spec.epoch, rank=spec.rank)
        with self._preparing:  # its time may come before it is done
            settle(os.environ)
            as_prepared = self._prepared == (spec.model, spec.mesh, spec.engine)
            self._worker = Worker(spec, self._standby if as_prepared else None)
        self._spec, self._digests = spec, self._worker.form()
        return self._digests

    def assignment(self) -> Assignment:
        """What this worker is part of. Raises what has ended its part."""
        return Assignment(self._endpoint(), self._spec, self._digests, self.progress().phase)

    def warm_up(self) -> None:
        assert self._worker is not None
        self._worker.warm_up()

    def serve(self) -> None:
        """Begins to lead or to follow, unless it does already. `progress` raises what ends that."""
        if self._serving:
            return
        self._serving = True
        threading.Thread(target=self._serve, daemon=True, name="serve").start()

    def _serve(self) -> None:
        assert self._worker is not None
        try:
            self._worker.serve()
        except Exception as error:
            _LOG.exception("this worker's part has ended")
            self._failure = error

    def profile(self, name: str, steps: int, seconds: float) -> dict[str, int]:
        """Takes a trace, see `Profiler.trace`, and keeps it under a name until it is forgotten. Paths and sizes of its
        files."""
        assert self._worker is not None
        self._traces[name] = self._worker.profiler.trace(steps, seconds)
        return {path: len(content) for path, content in self._traces[name].items()}

    def trace_part(self, name: str, path: str, start: int, length: int) -> bytes:
        """A part of a file of a trace. Small parts keep no event loop for long."""
        return self._traces[name][path][start : start + length]

    def forget_trace(self, name: str) -> None:
        self._traces.pop(name, None)

    def dump_stacks(self) -> None:
        """Writes to this process' log what each of its threads is doing. So does the signal USR1."""
        faulthandler.dump_traceback(all_threads=True)

    def progress(self) -> Progress:
        """What the worker is doing. Raises what has ended its part of the mesh."""
        failure = self._failure or (self._worker.failure if self._worker else None)
        if failure is not None:
            raise failure
        return self._worker.progress if self._worker else Progress("starting", 0.0)


def _reaches(place: tuple[str, int]) -> bool:
    try:
        socket.create_connection(place, timeout=_REACH_SECONDS).close()
    except OSError:
        return False
    return True


def _end_with(parent: int) -> None:
    """Ends this process when its parent, Ray's node, has ended: no call can reach it any more."""
    while os.getppid() == parent:
        time.sleep(_ORPHAN_SECONDS)
    os._exit(1)


def _end(pid: int) -> None:
    """Kills a process, and waits until it is gone."""
    while True:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            return
        with contextlib.suppress(OSError):  # dead, but its parent has not looked yet
            if _state(pid) == "Z":
                return
        time.sleep(0.01)


def _state(pid: int) -> str:
    """The letter of a process's state in Linux."""
    return pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
