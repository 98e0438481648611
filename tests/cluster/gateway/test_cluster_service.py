"""What operators see and do, with a fleet that is not there."""

from __future__ import annotations

import asyncio
import types
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
import ray.exceptions

from cluster.config.schema import Config
from cluster.controller.controller import NoReplicaError
from cluster.controller.replica import NotReadyError
from cluster.controller.view import GatewayReport, HostView, ReplicaView, ServiceView
from cluster.gateway.cluster_service import ClusterService
from cluster.gateway.controller_watch import ControllerWatch
from cluster.gateway.errors import GatewayError
from grok.serving.v1 import cluster_pb2
from workers.messages.frames import LayerGroup, Status
from workers.messages.request import Load
from workers.messages.specs import Endpoint, MeshSpec, ModelSpec, Progress


class _Controller:
    """Has one replica of one host, number 3, whose operations raise `problem`."""

    def __init__(self, problem: Exception | None) -> None:
        self._problem = problem

    async def sync(self, report: GatewayReport, version: tuple[str, int], seconds: float) -> ServiceView:
        del report, version, seconds
        endpoint = Endpoint("10.0.0.1", 4711, "n", 1, 2, 99, "c")
        replica = ReplicaView(
            index=3,
            state=cluster_pb2.REPLICA_STATE_READY,
            epoch=7,
            hosts=(HostView(endpoint, Progress("ready", 1.0, 4, 10, 20, 0.5)),),
            failures=2,
            last_failure="lost a host",
            load=Load(running=1, waiting=2, slots=8, pages_used=5, pages_total=50),
            status=Status(compilations=4, layer_groups=(LayerGroup(0, 1, (6, 7)),)),
            mesh=MeshSpec("cpu", 2, 2, 2, 2),
        )
        return ServiceView((replica,), 1, ("life", 1), requests=9)

    async def restart(self, replica: int) -> int:
        self._check(replica)
        return 8

    async def profile(self, replica: int, steps: int, seconds: float) -> AsyncIterator[tuple[int, str, bytes]]:
        del seconds
        self._check(replica)
        yield 0, f"{steps}.json", b"trace"

    def _check(self, replica: int) -> None:
        if self._problem:
            raise self._problem
        if replica != 3:
            raise NoReplicaError


def _service(problem: Exception | None = None) -> ClusterService:
    config = Config(model=ModelSpec("grok", "/m"), mesh=MeshSpec("cpu", 1, 4, 2, 2, "tensor"))
    controller = _Controller(problem)
    watch = ControllerWatch(controller, lambda: GatewayReport("one"), lambda view, report: None)
    return ClusterService(config, "1.2", controller, watch, "http://gateway/metrics")


def _call(left: float | None = None) -> Any:
    return types.SimpleNamespace(time_remaining=lambda: left)


def _profile(service: ClusterService, **request: Any) -> list[cluster_pb2.ProfileResponse]:
    async def collect() -> list[cluster_pb2.ProfileResponse]:
        return [part async for part in service.Profile(cluster_pb2.ProfileRequest(replica=3, **request), _call())]

    return asyncio.run(collect())


def _restart(service: ClusterService, replica: int = 3) -> cluster_pb2.RestartResponse:
    return asyncio.run(service.Restart(cluster_pb2.RestartRequest(replica=replica), _call()))


def test_a_status_has_what_replica_hosts_and_leader_report() -> None:
    status = asyncio.run(_service().GetStatus(cluster_pb2.GetStatusRequest(), _call()))
    (replica,) = status.replicas
    (host,) = replica.hosts
    assert (status.requests, status.model, status.version, status.wanted_replicas) == (9, "grok", "1.2", 1)
    assert (replica.index, replica.epoch, replica.mesh_data, replica.mesh_model) == (3, 7, 2, 2)
    assert (replica.running, replica.waiting, replica.slots, replica.pages_used, replica.pages_total) == (
        1,
        2,
        8,
        5,
        50,
    )
    assert (replica.failures, replica.last_failure, replica.compilations) == (2, "lost a host", 4)
    assert [list(group.expert_tokens) for group in replica.layer_groups] == [[6, 7]]
    assert (host.rank, host.pid, host.phase, host.devices, host.bytes_read, host.bytes_total) == (
        0,
        4711,
        "ready",
        4,
        10,
        20,
    )
    assert host.metrics_url == "http://10.0.0.1:99/metrics"


def test_restarts_and_traces_are_those_of_the_replica() -> None:
    assert _restart(_service()).epoch == 8
    assert [(part.path, part.content) for part in _profile(_service(), steps=5)] == [("5.json", b"trace")]


@pytest.mark.parametrize("steps", [0, 10**6])
def test_a_trace_of_so_many_steps_is_refused(steps: int) -> None:
    with pytest.raises(GatewayError, match="steps") as refused:
        _profile(_service(), steps=steps)
    assert refused.value.code is grpc.StatusCode.INVALID_ARGUMENT


def test_a_replica_that_is_not_there_is_named() -> None:
    with pytest.raises(GatewayError, match="is 4; there is no such replica"):
        _restart(_service(), replica=4)


@pytest.mark.parametrize(
    "operation", [_restart, lambda service: _profile(service, steps=5)], ids=["restart", "profile"]
)
def test_what_is_not_ready_says_so(operation: Any) -> None:
    with pytest.raises(GatewayError, match="replica 3 is forming") as refused:
        operation(_service(NotReadyError("replica 3 is forming")))
    assert refused.value.code is grpc.StatusCode.FAILED_PRECONDITION


@pytest.mark.parametrize(
    ("problem", "code"),
    [
        (ray.exceptions.RayTaskError("trace", "", ValueError("steps were to come after 5 s")), "DEADLINE_EXCEEDED"),
        (ray.exceptions.RayTaskError("trace", "", ValueError("one is recorded already")), "FAILED_PRECONDITION"),
        (ray.exceptions.RayActorError(), "UNAVAILABLE"),
    ],
    ids=["late", "busy", "lost"],
)
def test_a_trace_that_fails_has_the_status_of_its_cause(problem: Exception, code: str) -> None:
    with pytest.raises(GatewayError) as refused:
        _profile(_service(problem), steps=5)
    assert refused.value.code.name == code
