"""`grokmesh serve`: Ray, replicas and gateway in one process, until told to stop."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import pathlib
import signal
from collections.abc import Iterator

import prometheus_client
import ray

from cluster.config import Config, ConfigError, check_model
from cluster.gateway.router import Router
from cluster.gateway.server import Gateway
from cluster.gateway.validation import Limits
from cluster.local import local_cluster
from cluster.status import ClusterService
from cluster.supervisor import Replica
from cluster.telemetry import metrics
from grok.serving.v1 import cluster_pb2
from workers.checkpoint.checkpoint import open_checkpoint
from workers.tokenizer import Tokenizer


def serve(config: Config, path: pathlib.Path) -> None:
    """Serves until SIGTERM or SIGINT, then drains and cleans up.

    Raises:
      ConfigError, CheckpointError, TokenizerError: before anything is started, if the model can't be served so.
    """
    checkpoint = open_checkpoint(config.model.checkpoint)
    check_model(config, checkpoint.config, path)
    tokenizer = Tokenizer(config.model.checkpoint / "tokenizer.model")
    if tokenizer.vocab_size > checkpoint.config.vocab_size:
        raise ConfigError(
            f"{config.model.checkpoint}: the tokenizer has {tokenizer.vocab_size} pieces, "
            f"the model embeds {checkpoint.config.vocab_size}"
        )
    limits = Limits(checkpoint.config, config.engine.context or checkpoint.config.sequence_len)
    with _ray(config):
        asyncio.run(_serve(config, limits, tokenizer))


async def _serve(config: Config, limits: Limits, tokenizer: Tokenizer) -> None:
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    host, port = config.telemetry.metrics_address.rsplit(":", 1)
    try:
        metrics_server, _ = prometheus_client.start_http_server(int(port), host, registry=metrics.REGISTRY)
    except OSError as error:
        raise OSError(f"telemetry.metrics_address={host}:{port} can't be listened on: {error.strerror}") from error
    metrics_url = f"http://{host}:{metrics_server.server_port}/metrics"

    readiness: asyncio.Queue[bool] = asyncio.Queue()
    router = Router(on_change=lambda ready: readiness.put_nowait(ready > 0))
    metrics.QUEUED.set_function(lambda: router.queued)
    reporter = _Reporter()
    replicas = [Replica(i, config, router, reporter.report) for i in range(config.replicas)]
    status = ClusterService(config.mesh, replicas, router, lambda: gateway.admission.in_flight, metrics_url)
    gateway = Gateway(config.gateway, config.model.name, limits, tokenizer, router, status)
    await gateway.start()
    print(f"gateway at {config.gateway.address}, metrics at {metrics_url}", flush=True)

    async def follow_readiness() -> None:
        while True:
            ready = await readiness.get()
            await gateway.set_ready(ready)
            print("serving" if ready else "not serving: no replica is ready", flush=True)

    tasks = [asyncio.ensure_future(replica.run()) for replica in replicas]
    tasks.append(asyncio.ensure_future(follow_readiness()))
    stopped = asyncio.ensure_future(stop.wait())
    await asyncio.wait([stopped, *tasks], return_when=asyncio.FIRST_COMPLETED)
    print("stopping", flush=True)
    await gateway.stop()
    for task in (stopped, *tasks):
        task.cancel()
    results = await asyncio.gather(stopped, *tasks, return_exceptions=True)
    metrics_server.shutdown()
    for result in results:
        if isinstance(result, Exception):
            raise result


class _Reporter:
    """Prints what replicas are doing, each change once."""

    def __init__(self) -> None:
        self._said: dict[int, str] = {}

    def report(self, replica: Replica) -> None:
        """Prints the replica's state, if it is news."""
        state = cluster_pb2.ReplicaState.Name(replica.state).removeprefix("REPLICA_STATE_").lower()
        if replica.state == cluster_pb2.REPLICA_STATE_STARTING:
            phases = [
                f"host {rank} {view.progress.phase}"
                + (f" {view.progress.fraction:.0%}" if view.progress.phase == "loading" else "")
                for rank, view in enumerate(replica.hosts)
            ]
            text = ", ".join(phases)
        else:
            text = state
        line = f"replica {replica.index} epoch {replica.epoch}: {text}"
        if self._said.get(replica.index) != line:
            self._said[replica.index] = line
            print(line, flush=True)


@contextlib.contextmanager
def _ray(config: Config) -> Iterator[None]:
    """Connects to the configured Ray cluster, or runs a local one, while the block runs."""
    with contextlib.ExitStack() as stack:
        address = config.cluster.address
        if address == "local":
            hosts = config.replicas * config.mesh.hosts
            print(f"starting a local Ray cluster of {hosts} hosts", flush=True)
            address = stack.enter_context(local_cluster(hosts, config.cluster.cpus_per_host))
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, namespace="grokmesh")
        stack.callback(ray.shutdown)
        yield
