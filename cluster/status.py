"""The ClusterService: how replicas, hosts and gateway are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import grpc.aio

from cluster.config import MeshSection
from cluster.gateway.router import Router
from cluster.supervisor import HostView, Replica
from grok.serving.v1 import cluster_pb2, cluster_pb2_grpc


class ClusterService(cluster_pb2_grpc.ClusterServiceServicer):
    """Answers from what supervisor and router know; asks nobody."""

    def __init__(
        self,
        mesh: MeshSection,
        replicas: Sequence[Replica],
        router: Router,
        requests: Callable[[], int],
        metrics_url: str,
    ) -> None:
        self._mesh = mesh
        self._replicas = replicas
        self._router = router
        self._requests = requests
        self._metrics_url = metrics_url

    async def GetStatus(
        self, request: cluster_pb2.GetStatusRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> cluster_pb2.GetStatusResponse:
        """The status now."""
        return cluster_pb2.GetStatusResponse(
            replicas=[self._replica(replica) for replica in self._replicas],
            requests=self._requests(),
            metrics_url=self._metrics_url,
        )

    def _replica(self, replica: Replica) -> cluster_pb2.ReplicaStatus:
        load = self._router.load(replica.index)
        return cluster_pb2.ReplicaStatus(
            index=replica.index,
            state=replica.state,
            epoch=replica.epoch,
            mesh_data=self._mesh.data,
            mesh_model=self._mesh.model,
            hosts=[_host(rank, view) for rank, view in enumerate(replica.hosts)],
            running=load.running,
            waiting=load.waiting,
            slots=load.slots,
            pages_used=load.pages_used,
            pages_total=load.pages_total,
            compilations=load.compilations,
            last_failure=replica.last_failure,
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
        metrics_url=f"http://{endpoint.address}:{endpoint.metrics_port}/metrics",
    )
