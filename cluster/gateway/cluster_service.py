"""The ClusterService: how replicas, hosts and gateway are, and traces of what they compute."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncIterator
from typing import Any

import grpc
import grpc.aio
import ray.exceptions

from cluster.config.schema import Config
from cluster.controller.controller import ControllerClient, NoReplicaError
from cluster.controller.replica import NotReadyError
from cluster.controller.view import GatewayReport, HostView, ReplicaView
from cluster.gateway.controller_watch import ControllerWatch
from cluster.gateway.errors import GatewayError, Violation, invalid, unavailable
from grok.serving.v1 import cluster_pb2, cluster_pb2_grpc

DEFAULT_PROFILE_STEPS = 20
MAX_PROFILE_STEPS = 1000
#: Seconds that a trace may take if the call has no deadline, and seconds of a deadline that are kept for sending it.
PROFILE_SECONDS, PROFILE_RESERVE = 60.0, 5.0


class ClusterService(cluster_pb2_grpc.ClusterServiceServicer):
    """Answers from what the controller last reported; asks it for traces and restarts. Raises GatewayError."""

    def __init__(
        self, config: Config, version: str, controller: ControllerClient, watch: ControllerWatch, metrics_url: str
    ) -> None:
        self._config = config
        self._version = version
        self._controller = controller
        self._watch = watch
        self._metrics_url = metrics_url

    def status(self) -> cluster_pb2.GetStatusResponse:
        """As the controller last reported it."""
        view = self._watch.view
        return cluster_pb2.GetStatusResponse(
            replicas=[self._replica(replica) for replica in view.replicas],
            requests=view.requests,
            metrics_url=self._metrics_url,
            model=self._config.model.name,
            version=self._version,
            wanted_replicas=view.wanted,
            controller_metrics_url=view.metrics_url,
            controller_pid=view.pid,
            gateways=[_gateway(gateway) for gateway in view.gateways],
        )

    async def GetStatus(
        self, request: cluster_pb2.GetStatusRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> cluster_pb2.GetStatusResponse:
        await self._watch.refresh()
        return self.status()

    async def Profile(
        self, request: cluster_pb2.ProfileRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> AsyncIterator[cluster_pb2.ProfileResponse]:
        """Trace files of all hosts of a replica, host by host."""
        steps = request.steps if request.HasField("steps") else DEFAULT_PROFILE_STEPS
        if not 1 <= steps <= MAX_PROFILE_STEPS:
            raise invalid([Violation("steps", f"is {steps}; must be from 1 to {MAX_PROFILE_STEPS}")])
        left = context.time_remaining()
        seconds = PROFILE_SECONDS if left is None else max(left - PROFILE_RESERVE, 1.0)
        try:
            async for rank, path, content in self._controller.profile(request.replica, steps, seconds):
                yield cluster_pb2.ProfileResponse(rank=rank, path=path, content=content)
        except NoReplicaError as error:
            raise _no_replica(request.replica) from error
        except NotReadyError as error:
            raise _not_ready(error) from error
        except ray.exceptions.RayTaskError as error:
            late = "were to come after" in str(error.cause)
            code = grpc.StatusCode.DEADLINE_EXCEEDED if late else grpc.StatusCode.FAILED_PRECONDITION
            raise GatewayError(code, "NO_TRACE", f"no trace: {error.cause}") from error
        except ray.exceptions.RayError as error:
            raise unavailable(f"no trace: a host of replica {request.replica} is lost") from error

    async def Restart(
        self, request: cluster_pb2.RestartRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> cluster_pb2.RestartResponse:
        """Gives a replica new worker processes."""
        try:
            # Shielded: what has begun must end, or the replica would drain for ever.
            epoch = await asyncio.shield(self._controller.restart(request.replica))
            return cluster_pb2.RestartResponse(epoch=epoch)
        except NoReplicaError as error:
            raise _no_replica(request.replica) from error
        except NotReadyError as error:
            raise _not_ready(error) from error
        except (OSError, ray.exceptions.RayError) as error:
            raise unavailable("the controller does not answer; Ray starts it again") from error

    def _replica(self, replica: ReplicaView) -> cluster_pb2.ReplicaStatus:
        load, status = replica.load, replica.status
        return cluster_pb2.ReplicaStatus(
            index=replica.index,
            state=replica.state,
            epoch=replica.epoch,
            mesh_data=replica.mesh.data,
            mesh_model=replica.mesh.model,
            hosts=[_host(rank, view) for rank, view in enumerate(replica.hosts)],
            running=load.running,
            waiting=load.waiting,
            slots=load.slots,
            pages_used=load.pages_used,
            pages_total=load.pages_total,
            compilations=status.compilations,
            last_failure=replica.last_failure,
            failures=replica.failures,
            layer_groups=[cluster_pb2.LayerGroup(**dataclasses.asdict(group)) for group in status.layer_groups],
        )


def _no_replica(index: int) -> GatewayError:
    return invalid([Violation("replica", f"is {index}; there is no such replica")])


def _not_ready(error: NotReadyError) -> GatewayError:
    return GatewayError(grpc.StatusCode.FAILED_PRECONDITION, "NOT_READY", str(error))


def _gateway(gateway: GatewayReport) -> cluster_pb2.GatewayStatus:
    return cluster_pb2.GatewayStatus(
        address=gateway.address,
        pid=gateway.pid,
        metrics_url=gateway.metrics_url,
        requests=gateway.requests,
        listening=gateway.listening,
        replicas=gateway.replicas,
    )


def _host(rank: int, view: HostView) -> cluster_pb2.HostStatus:
    endpoint, progress = view.endpoint, view.progress
    return cluster_pb2.HostStatus(
        rank=rank,
        address=endpoint.address,
        pid=endpoint.pid,
        phase=progress.phase,
        progress=progress.fraction,
        devices=progress.devices,
        bytes_read=progress.bytes_read,
        bytes_total=progress.bytes_total,
        bytes_per_second=progress.bytes_per_second,
        metrics_url=f"http://{endpoint.address}:{endpoint.metrics_port}/metrics",
    )
