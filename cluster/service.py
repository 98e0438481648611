"""`grokmesh serve`: starts a service on a Ray cluster, or finds it there, shows what goes on, and ends it."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import ipaddress
import logging
import pathlib
import secrets
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator

import ray
import ray.exceptions

from cluster import daemon
from cluster.capacity import smaller_configs, with_failover, with_pages
from cluster.config.schema import Config, check_model
from cluster.controller.actor import deploy
from cluster.controller.client import RayController
from cluster.controller.placement import forget_weights
from cluster.controller.view import ReplicaView, ServiceView
from cluster.deployment import Deployment
from cluster.gateway.auth.api_keys import Keys
from cluster.gateway.auth.tls import server_credentials
from cluster.gateway.process import read_model
from cluster.local_ray import local_cluster
from cluster.telemetry.log_files import LogFollower, keep_log_small
from grok.serving.v1 import cluster_pb2
from workers.host.streams import wait_for_listener
from workers.messages.specs import LOADING

_LOG = logging.getLogger(__name__)

#: Seconds that Ray may take to be there, when this process starts beside it.
RAY_SECONDS = 120.0
#: Seconds that it may take when a service is to be stopped.
STOP_SECONDS = 10.0
WATCH_SECONDS = 2.0
#: Seconds between looks at what is to be shown.
SHOW_SECONDS = 0.2


def serve(config: Config, path: pathlib.Path, *, replace: bool = False) -> None:
    """Serves until SIGTERM or SIGINT, or until the Ray cluster is gone, then drains and cleans up.

    Args:
      config: what to serve.
      path: of the configuration, for errors.
      replace: take over from the service that runs at the address. On the same Ray cluster it goes on with what runs: gateways
        are replaced one by one, and replicas that are configured otherwise. On another one, as a local one always is, the other
        is asked to drain once this one's replicas are ready.

    Raises:
      ConfigError, KeysError, TlsError, CheckpointError, TokenizerError, TemplateError: before anything is started, if the
        model can't be served so.
      DaemonError: a service runs at the address already, or there is none to replace.
      OSError: an address can't be listened on, or no Ray cluster answers.
    """
    _, limits, _ = read_model(config)
    check_model(config, limits.model, path)
    smaller = smaller_configs(config, limits.model, path)
    config = with_failover(with_pages(config, limits.model, path), limits.model)
    Keys(config.gateway.api_keys)
    if config.gateway.tls_certificate is not None:
        server_credentials(config.gateway)
    for setting, listens in (("address", config.gateway.address), ("http_address", config.gateway.http_address)):
        if config.gateway.api_keys is None and listens is not None and not _loopback(listens):
            _LOG.warning(
                "every client that reaches gateway.%s=%s can use this service: set gateway.api_keys, or listen on 127.0.0.1",
                setting,
                listens,
            )
    address = config.gateway.address
    ray_address = config.cluster.address
    entry = daemon.Entry(
        daemon.admin_key(address) or f"gm-local-{secrets.token_urlsafe(32)}",
        "" if ray_address == "local" else ray_address,
        _namespace(config.gateway.address),
    )
    with contextlib.ExitStack() as stack:
        predecessor = daemon.replaceable(address) if replace else None
        if predecessor is None:
            stack.enter_context(daemon.noted(address, entry))
        stack.enter_context(_ray(config))
        asyncio.run(_Launch(config, smaller, entry, predecessor).run())


def _loopback(address: str) -> bool:
    """Whether only this machine can reach an address."""
    host = address.rpartition(":")[0].strip("[]")
    try:
        return all(
            ipaddress.ip_address(found[4][0]).is_loopback
            for found in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
        )
    except (OSError, ValueError):
        return False


class _Launch:
    """The service, as the process sees it that has started it: it shows what goes on, and ends the service when it is to end
    itself. The service outlives it otherwise, unless the Ray cluster is its own."""

    def __init__(
        self, config: Config, smaller: tuple[Config, ...], entry: daemon.Entry, predecessor: int | None
    ) -> None:
        self._config = config
        self._smaller = smaller
        self._address = config.gateway.address
        self._entry = entry
        self._predecessor = predecessor
        self._controller = RayController()
        self._reporter = _Reporter()
        self._logs = LogFollower(sys.stderr)

    async def run(self) -> None:
        """Until the service is to end, or the Ray cluster is gone."""
        stop = asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, stop.set)
        await self._deploy()
        work = [self._follow(), _watch_ray(), keep_log_small()]
        tasks = [asyncio.ensure_future(part) for part in (stop.wait(), *work)]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            _LOG.info("stopping")
            await self._leave()
        finally:
            for task in tasks:
                task.cancel()
            results = await asyncio.gather(*tasks, return_exceptions=True)
            self._logs.look()
        for result in results:
            if isinstance(result, Exception):
                raise result

    async def _deploy(self) -> None:
        """Starts the service, or goes on with the one that is there. Raises OSError, RayError."""
        try:
            await self._controller.start()
            self._logs.skip(_logs_here(await self._controller.view()))
            found = True
        except OSError:
            found = False
        if not found and self._predecessor is None:
            gateway, telemetry = self._config.gateway, self._config.telemetry
            await asyncio.to_thread(check_free, "gateway.address", gateway.address)
            if gateway.http_address is not None:
                await asyncio.to_thread(check_free, "gateway.http_address", gateway.http_address)
            await asyncio.to_thread(check_free, "telemetry.address", telemetry.address)
        budgets, seconds = daemon.left_budgets(self._address)
        deployment = Deployment(
            self._config,
            self._entry.admin_key,
            ray.util.get_node_ip_address(),
            secrets.token_hex(4),
            beside=self._predecessor is not None,
            budgets=budgets,
            budgets_at=time.time() - seconds,
            smaller=self._smaller,
        )
        served = await deploy(deployment, anew=self._predecessor is not None)
        if self._predecessor is None:
            daemon.sign(self._address, dataclasses.replace(self._entry, admin_key=served.admin_key))
        elif found:  # all that it had goes on
            daemon.ask(self._address, daemon.LEAVE_SERVICE)
            self._take_over(self._predecessor)

    async def _leave(self) -> None:
        """Ends the service, unless a successor goes on with it."""
        if daemon.asked(self._address, daemon.LEAVE_SERVICE):
            return
        daemon.leave_budgets(self._address, await self._controller.end())
        cache = self._config.model.weights_cache
        if daemon.asked(self._address, daemon.FORGET_WEIGHTS) and cache is not None:
            await asyncio.to_thread(forget_weights, cache)

    async def _follow(self) -> None:
        """Shows what replicas and gateways do, and what they write to their logs on this host."""
        listening = serving = False
        while True:
            with contextlib.suppress(OSError, ray.exceptions.RayError):
                view = await self._controller.view()
                self._logs.follow(_logs_here(view))
                for replica in view.replicas:
                    self._reporter.report(replica)
                gateways = [gateway for gateway in view.gateways if gateway.listening]
                if gateways and not listening:
                    listening = True
                    metrics = f"metrics at http://{self._config.telemetry.address}/metrics"
                    _LOG.info("%s %s, %s", daemon.LISTENING, self._address, metrics)
                ready = bool(gateways) and all(gateway.replicas for gateway in gateways)
                if ready and self._predecessor is not None:
                    self._take_over(self._predecessor)
                if ready != serving:
                    serving = ready
                    _LOG.info(daemon.SERVING if ready else "not serving: no replica is ready")
            self._logs.look()
            await asyncio.sleep(SHOW_SECONDS)

    def _take_over(self, predecessor: int) -> None:
        """Asks the predecessor to end, and takes its place in the notes when it has."""
        self._predecessor = None
        _LOG.info("ready to replace process %d, which ends now", predecessor)
        if daemon.running(self._address) == predecessor:
            daemon.terminate(predecessor)
        loop = asyncio.get_running_loop()

        def inherit() -> None:
            daemon.inherit(self._address, self._entry)
            with contextlib.suppress(RuntimeError):  # this process ends too
                asyncio.run_coroutine_threadsafe(self._inherit_budgets(), loop)

        threading.Thread(target=inherit, daemon=True).start()

    async def _inherit_budgets(self) -> None:
        """Keys have spent what they spent with the service before."""
        with contextlib.suppress(OSError, ray.exceptions.RayError):
            await self._controller.inherit(*daemon.left_budgets(self._address))


def _logs_here(view: ServiceView) -> list[str]:
    """The logs of a service's processes on this host."""
    here = ray.util.get_node_ip_address()
    found = [(view.address, view.log), *((gateway.address, gateway.log) for gateway in view.gateways)]
    return [log for address, log in found if log and address == here]


async def _watch_ray() -> None:
    """Ends when the Ray cluster is gone."""
    while await asyncio.to_thread(_ray_answers):
        await asyncio.sleep(WATCH_SECONDS)
    _LOG.error("the Ray cluster is gone")


def _ray_answers() -> bool:
    return bool(ray.is_initialized() and ray.nodes())


class _Reporter:
    """Logs what replicas are doing, each change once."""

    def __init__(self) -> None:
        self._said: dict[int, str] = {}

    def report(self, replica: ReplicaView) -> None:
        """Logs the replica's state, if it is news."""
        state = cluster_pb2.ReplicaState.Name(replica.state).removeprefix("REPLICA_STATE_").lower()
        if replica.state in (cluster_pb2.REPLICA_STATE_FAILED, cluster_pb2.REPLICA_STATE_GIVEN_UP):
            state = f"{state}: {replica.last_failure}"
        if replica.state == cluster_pb2.REPLICA_STATE_STARTING:
            text = ", ".join(f"host {rank} {view.progress.phase}" for rank, view in enumerate(replica.hosts))
        else:
            text = state
        line = f"replica {replica.index} epoch {replica.epoch}: {text}"
        loading = [view.progress for view in replica.hosts if view.progress.phase == LOADING]
        slowest = min(loading, key=lambda progress: progress.fraction, default=None)
        # While a checkpoint loads, each tenth of it is news.
        news = line if slowest is None else f"{line} {int(10 * slowest.fraction)}"
        if self._said.get(replica.index) != news:
            self._said[replica.index] = news
            shown = f"{line}, {slowest.loading}" if slowest is not None and slowest.bytes_total else line
            _LOG.info("%s", shown, extra=replica.log_fields)


@contextlib.contextmanager
def _ray(config: Config) -> Iterator[None]:
    """Connects to the configured Ray cluster, or runs a local one, while the block runs."""
    with contextlib.ExitStack() as stack:
        address = config.cluster.address
        if address == "local":
            hosts = config.replicas * config.mesh.hosts
            _LOG.info("starting a local Ray cluster of %d hosts", hosts)
            address = stack.enter_context(local_cluster(hosts, config.cluster.cpus_per_host))
        stack.enter_context(connected(address, _namespace(config.gateway.address)))
        yield


def end_left(entry: daemon.Entry, *, forget: bool) -> None:
    """Ends a service that goes on without the process that has started it. Raises OSError, RayError."""

    async def end() -> None:
        controller = RayController()
        cache = (await controller.start()).config.model.weights_cache
        await controller.end()
        if forget and cache is not None:
            await asyncio.to_thread(forget_weights, cache)

    with connected(entry.cluster, entry.name, STOP_SECONDS):
        asyncio.run(end())


def _namespace(address: str) -> str:
    """Of Ray, for the service at an address."""
    return f"grokmesh at {address}"


@contextlib.contextmanager
def connected(address: str, namespace: str, seconds: float = RAY_SECONDS) -> Iterator[None]:
    """Connects to a Ray cluster while the block runs. Raises OSError if none answers for so long."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            _reach(address)
            # Ray has workers search the current folder for modules, and what lies there is not ours.
            with contextlib.chdir("/"):
                ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, namespace=namespace)
            break
        except ConnectionError as error:
            if time.monotonic() > deadline:
                raise OSError(f"cluster.address={address}: no Ray cluster answers: {error}") from error
            time.sleep(1.0)
    try:
        yield
    finally:
        ray.shutdown()


def _reach(address: str) -> None:
    """Raises ConnectionError if nothing listens at `host:port`, for which Ray itself would try for minutes."""
    _, found, port = address.rpartition(":")
    if found and port.isdecimal() and "://" not in address:
        wait_for_listener(address, 0)


def check_free(setting: str, address: str) -> None:
    """Raises OSError if a process listens at the address of a setting, however it is spelled: gateways would share it."""
    host, port = address.rsplit(":", 1)
    for family, kind, protocol, _, place in socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM):
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(place)
            except OSError as error:
                raise OSError(f"{setting}={address} can't be listened on: {error.strerror}") from error
