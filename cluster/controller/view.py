"""What the controller knows of a service, as gateways and operators see it. A view is a value: it does not change."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from cluster.controller.ledger import KeyState, KeyUse
from cluster.leader_stream import LeaderAddress
from grok.serving.v1 import cluster_pb2
from workers.messages.frames import Status
from workers.messages.request import Load
from workers.messages.specs import Endpoint, MeshSpec, Progress

_NO_LOAD, _NO_STATUS, _NO_MESH = Load(), Status(), MeshSpec()


@dataclasses.dataclass(frozen=True)
class HostView:
    """A host as it was last seen."""

    endpoint: Endpoint
    progress: Progress


@dataclasses.dataclass(frozen=True)
class ReplicaView:
    """A replica.

    Attributes:
      index: its number.
      state: of its life, a `ReplicaState` of the API.
      epoch: of its mesh.
      leader: where requests go; None while it does not serve.
      draining: whether it takes no new requests, and only goes on with what it has.
      returns: whether requests may wait for it while it does not serve.
      numbers: of the model that it serves, see `ModelSpec`.
      hosts: in rank order.
      failures: in a row.
      last_failure: in words.
      load, status: last reported by its leader.
      mesh: its mesh, or what it is to be.
    """

    index: int
    state: cluster_pb2.ReplicaState.ValueType
    epoch: int
    leader: LeaderAddress | None = None
    draining: bool = False
    returns: bool = False
    numbers: tuple[str | None, ...] = ()
    hosts: tuple[HostView, ...] = ()
    failures: int = 0
    last_failure: str = ""
    load: Load = _NO_LOAD
    status: Status = _NO_STATUS
    mesh: MeshSpec = _NO_MESH

    @property
    def log_fields(self) -> dict[str, int]:
        """For a log line's `extra`."""
        return {"replica": self.index, "epoch": self.epoch}


@dataclasses.dataclass(frozen=True)
class GatewayReport:
    """What a gateway sees and leaders do not.

    Attributes:
      name: of the gateway, which its next process has too if this one dies.
      address: of its host.
      pid: of the process.
      metrics_url: where its metrics are.
      log: path of its log, on its host.
      listening: whether it takes requests.
      replicas: that it can send them to.
      requests: that are in it.
      unplaced: those of them that wait for a replica.
      time_to_first_token: seconds, of the slowest tenth of recent requests.
      keys: what keys with limits use of it.
    """

    name: str
    address: str = ""
    pid: int = 0
    metrics_url: str = ""
    log: str = ""
    listening: bool = False
    replicas: int = 0
    requests: int = 0
    unplaced: int = 0
    time_to_first_token: float = 0.0
    keys: Mapping[str, KeyUse] = dataclasses.field(default_factory=dict)

    @property
    def life(self) -> str:
        """Names the gateway's process."""
        return f"{self.name}-{self.pid}"


@dataclasses.dataclass(frozen=True)
class ServiceView:
    """A service.

    Attributes:
      replicas: in the order of their numbers.
      wanted: replicas that the autoscaler wants.
      version: of this controller's life, and a number that grows whenever gateways have to act.
      requests: in all gateways.
      address, pid, metrics_url, log: of the controller, as of a gateway.
      gateways: that have reported lately.
      keys: what gateways together know of the keys that were reported with the question.
    """

    replicas: tuple[ReplicaView, ...] = ()
    wanted: int = 0
    version: tuple[str, int] = ("", 0)
    requests: int = 0
    address: str = ""
    pid: int = 0
    metrics_url: str = ""
    log: str = ""
    gateways: tuple[GatewayReport, ...] = ()
    keys: Mapping[str, KeyState] = dataclasses.field(default_factory=dict)
