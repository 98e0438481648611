"""One host's process: joins the mesh, loads its part of the model, compiles, then leads or follows. No Ray in here."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import logging
import os
import pathlib
import time
from typing import TYPE_CHECKING, Any

from workers.engine.scheduler import Scheduler
from workers.host.environment import bypass_proxies
from workers.host.plan_log import LoggedEngine, PlanLog
from workers.host.streams import LeaderServer, connect, wait_for_listener
from workers.messages.frames import Hello
from workers.messages.specs import COMPILING, JOINING, LOADING, PREPARING, READY, WARMING_UP, Progress, RankSpec
from workers.telemetry import garbage, metrics
from workers.telemetry.stalls import StallWatch
from workers.text.grammar_job import Constraints
from workers.text.sandbox import Sandbox

if TYPE_CHECKING:
    from workers.host.standby import StandbyEngine
    from workers.model.partition import Partition
    from workers.runtime.profiler import Profiler

_LOG = logging.getLogger(__name__)

#: Seconds after which JAX's coordination service takes a silent host for dead.
HEARTBEAT_SECONDS = 10
JOIN_SECONDS = 60.0
#: Grammars that are followed for requests that wait for a slot.
SPARE_GRAMMARS = 16


class Worker:
    """A host's life in one epoch: `form`, then `warm_up`, then `serve`. A process serves one epoch and then ends."""

    def __init__(self, spec: RankSpec, standby: StandbyEngine | None = None) -> None:
        """With a `standby` for the same model, mesh and engine, less is left to do."""
        self._spec = spec
        self._standby = standby
        self._server: LeaderServer | None = None
        self._sandbox: Sandbox | None = None
        self._compilations = 0
        self._compilations_before_serving = 0
        self.profiler: Profiler
        self.progress = Progress("starting", 0.0)

    def form(self) -> dict[str, int]:
        """Joins the mesh, loads this host's shards and compiles every program. Returns the digests of what was loaded; see
        `checkpoint.digests`.

        Raises:
          CheckpointError, ConfigError: the model can't be loaded.
          ValueError: mesh and devices, or mesh and model, do not fit.
        """
        a = self._spec
        metrics.EPOCH.set(a.epoch)
        self._report(PREPARING, 0.0)
        if a.leader and a.rank == 0:
            # Before the long work, during which another process might take the port.
            self._server = LeaderServer(a.leader, a.epoch, a.secret, a.silence_seconds)
        from workers.host.standby import StandbyEngine

        standby = self._standby or StandbyEngine(a.model, a.mesh, a.engine)
        self._join()
        from workers.host.kernel_selection import negotiate
        from workers.model.partition import Partition
        from workers.runtime.compilation import every_rank_writes, use_cache
        from workers.runtime.mesh import make_mesh
        from workers.runtime.profiler import Profiler

        if a.compilation_cache:
            use_cache(a.compilation_cache, a.rank)
        mesh = make_mesh(a.mesh.data, a.mesh.model)
        config = standby.checkpoint.config
        if self._server is not None:
            # So that the first request with a grammar need not wait for it.
            words = [a.model.checkpoint, str(config.vocab_size), str(config.eos_token)]
            self._sandbox = Sandbox("workers.text.grammar_job", words)
        with every_rank_writes():
            standby.adopt(negotiate(standby.kernels, JOIN_SECONDS))
        _LOG.info("kernels: %s", standby.kernels.name)
        if standby.kernels.collectives is not None and a.mesh.hosts > 1:
            from workers.host.rendezvous import meet

            meet(a.coordinator, a.rank, a.secret, a.silence_seconds, JOIN_SECONDS)
        digests = self._load(standby, Partition.create(config, mesh, a.mesh.rules, standby.kernels))
        self.profiler = Profiler()
        for kind, size in self.runtime.device_bytes.items():
            metrics.DEVICE_BYTES.labels(kind).set(size)
        self._report("compiled", 1.0)
        return digests

    def _join(self) -> None:
        """Makes this process one of those that form the mesh."""
        import jax

        a = self._spec
        self._report(JOINING, 0.0)
        jax.monitoring.register_event_duration_secs_listener(self._count_compilation)
        if a.mesh.hosts == 1:
            return
        bypass_proxies([a.coordinator.rpartition(":")[0]], os.environ)
        if a.rank:
            wait_for_listener(a.coordinator, JOIN_SECONDS)  # JAX itself would try again only after a second
        jax.distributed.initialize(
            coordinator_address=a.coordinator,
            coordinator_bind_address=a.coordinator if a.rank == 0 else None,
            num_processes=a.mesh.hosts,
            process_id=a.rank,
            cluster_detection_method="deactivate",  # SLURM's and others' variables would leave one GPU of a host
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
            shutdown_timeout_seconds=HEARTBEAT_SECONDS // 2,
        )

    def _load(self, standby: StandbyEngine, partition: Partition) -> dict[str, int]:
        """Loads this host's shards and compiles every program at once. The digests of what was loaded."""
        import jax

        from workers.checkpoint.loader import LoadProgress, load_parameters
        from workers.runtime.compilation import every_rank_writes
        from workers.runtime.runtime import Runtime

        began, devices, tensors = time.monotonic(), jax.local_device_count(), len(standby.checkpoint.tensors)

        def loaded(progress: LoadProgress) -> None:
            seconds = time.monotonic() - began
            metrics.LOAD_SECONDS.set(seconds)
            metrics.CHECKPOINT_BYTES.inc(progress.read - self.progress.bytes_read)
            metrics.CACHED_BYTES.set(progress.mapped)
            metrics.TAKEN_BYTES.set(progress.taken)
            fraction = progress.tensors / tensors
            rate = progress.read / max(seconds, 1e-9)
            phase = LOADING if fraction < 1 else COMPILING
            self.progress = Progress(phase, fraction, devices, progress.read, progress.total, rate)

        def compiled(fraction: float) -> None:
            if self.progress.phase != LOADING:
                self._report(COMPILING, fraction)

        weights, dtype = self._spec.model.weights, standby.dtype
        cache = self._spec.model.weights_cache
        load = functools.partial(
            load_parameters,
            standby.checkpoint,
            partition,
            weights=weights,
            dtype=dtype,
            report=loaded,
            cache=pathlib.Path(cache) if cache else None,
            twins=self._spec.twins,
        )
        with every_rank_writes(), concurrent.futures.ThreadPoolExecutor(1, "load") as pool:
            # Reading and packing weights leaves cores for the compiler, and the other way round.
            loading = pool.submit(load)
            self.runtime = Runtime(standby.program_set, partition, compiled)
            parameters, read = loading.result()
        self.runtime.set_parameters(parameters)
        return read.digests

    @property
    def failure(self) -> Exception | None:
        """Why the mesh that this rank leads is over, if it is, though a step of it may hang still."""
        return self._server.failure if self._server is not None else None

    def warm_up(self) -> None:
        """Runs every program once, together with all other hosts, which must have formed."""
        self._report(WARMING_UP, 0.0)
        self.runtime.warm_up()
        self._compilations_before_serving = self._compilations
        garbage.settle()
        self._report(READY, 1.0)

    def serve(self) -> None:
        """Leads or follows until the epoch is over."""
        a = self._spec
        from workers.host.follower import follow
        from workers.host.leader import Leader

        if a.rank:
            hello = Hello(a.epoch, a.secret, a.rank, liveness=a.liveness)
            follow(self.runtime, connect(a.leader, hello, JOIN_SECONDS), a.epoch, self.profiler)
            return
        runtime = self.runtime
        scheduler = Scheduler(runtime.shape, runtime.config.vocab_size, a.engine.max_waiting, a.engine.steps_per_plan)
        assert self._server is not None
        assert self._sandbox is not None
        try:
            self._server.wait_for_followers(a.mesh.hosts - 1, JOIN_SECONDS)
            metrics.lead()
            compilations = self._compilations_while_serving
            slowdown = a.engine.prefill_slowdown
            constraints = Constraints(self._sandbox, runtime.shape.slots + SPARE_GRAMMARS, self._server.wake)
            stalls = StallWatch("the leader's loop", a.stall_seconds, _LOG.warning)
            log = None
            if a.plan_log:
                path = pathlib.Path(a.plan_log) / f"replica{a.replica}-epoch{a.epoch}.plans"
                log = PlanLog(path, LoggedEngine(a.model, a.mesh, a.engine, runtime.kernels))
            leader = Leader(
                runtime,
                scheduler,
                self._server,
                a.epoch,
                compilations,
                self.profiler,
                constraints,
                stalls,
                slowdown,
                log,
            )
            leader.run()
        finally:
            self._server.close()
            self._sandbox.close()

    def _compilations_while_serving(self) -> int:
        return self._compilations - self._compilations_before_serving

    def _count_compilation(self, event: str, duration_secs: float, **_: Any) -> None:
        del duration_secs
        if event == "/jax/core/compile/backend_compile_duration":
            self._compilations += 1
            metrics.COMPILATIONS.inc()

    def _report(self, phase: str, fraction: float) -> None:
        before = self.progress
        self.progress = dataclasses.replace(before, phase=phase, fraction=fraction, bytes_per_second=0.0)
        _LOG.info("%s", phase)
