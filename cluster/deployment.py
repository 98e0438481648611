"""A service as it was asked for: what `grokmesh serve` hands to the controller, and the controller to gateways."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from cluster.config.schema import Config


@dataclasses.dataclass(frozen=True)
class Deployment:
    """A service.

    Attributes:
      config: of it, with everything that follows from others filled in.
      smaller: configurations of fewer hosts with which replicas go on when hosts are lost, those of the most hosts first.
      admin_key: of the user that has started it.
      host: address of the host where that was: gateways run there, or everywhere.
      token: names it. Gateways of another deployment are replaced.
      beside: whether another service may be at the address still: gateways listen only once they can serve.
      budgets: what keys had spent when the service before ended: tokens a minute, and how many are missing.
      budgets_at: when that was, in seconds since 1970.
    """

    config: Config
    admin_key: str = dataclasses.field(repr=False)
    host: str
    token: str
    beside: bool = False
    budgets: Mapping[str, tuple[int, float]] = dataclasses.field(default_factory=dict)
    budgets_at: float = 0.0
    smaller: tuple[Config, ...] = ()
