"""What a worker makes of the environment that it is started in, before JAX is imported: what serving depends on is not left
to a shell."""

from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Iterable, MutableMapping

_LOG = logging.getLogger(__name__)

#: JAX's settings that say nothing of what is computed; all others are the configuration's business.
_HARMLESS = ("JAX_PLATFORMS", "JAX_TRACEBACK_FILTERING", "JAX_LOGGING_LEVEL", "JAX_DEBUG_LOG_MODULES")
_FLAGS_SECONDS = 60.0


class EnvironmentProblem(RuntimeError):  # noqa: N818
    """An environment in which no mesh can be formed."""


def settle(environment: MutableMapping[str, str]) -> None:
    """Takes out what would change what is computed, and says so. Raises EnvironmentProblem for flags that XLA does not know."""
    dropped = sorted(name for name in environment if name.startswith("JAX_") and name not in _HARMLESS)
    for name in dropped:
        del environment[name]
    if dropped:
        _LOG.warning("ignored %s of the environment: ray_config.yaml decides", ", ".join(dropped))
    if environment.get("XLA_FLAGS"):
        _check_flags(environment)


def _check_flags(environment: MutableMapping[str, str]) -> None:
    # XLA ends the process that has flags which it does not know.
    command = [sys.executable, "-P", "-c", "import jax; jax.config.update('jax_platforms', 'cpu'); jax.devices()"]
    done = subprocess.run(
        command, env=dict(environment), capture_output=True, text=True, timeout=_FLAGS_SECONDS, check=False
    )
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if "XLA_FLAGS" in line or "lag" in line]
        problem = said[0][-200:] if said else f"code {done.returncode}"
        raise EnvironmentProblem(f"XLA_FLAGS={environment['XLA_FLAGS']}: {problem}; unset what XLA does not know")


def share_devices(platform: str, environment: MutableMapping[str, str]) -> None:
    """What a process that computes on a platform's devices needs, before JAX makes them."""
    if platform == "gpu":
        # The share that the planner counts on; JAX's own is less.
        environment.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.9")
        # Else ranks tune operations for each other, and one that finds its own programs in its cache leaves the others waiting.
        environment["XLA_FLAGS"] = f"{environment.get('XLA_FLAGS', '')} --xla_gpu_shard_autotuning=false".strip()


def bypass_proxies(hosts: Iterable[str], environment: MutableMapping[str, str]) -> None:
    """Has gRPC connect to hosts of the mesh directly, whatever proxy the environment names: JAX's coordination goes over it."""
    known = environment.get("no_grpc_proxy", environment.get("no_proxy", environment.get("NO_PROXY", "")))
    environment["no_grpc_proxy"] = ",".join([*filter(None, known.split(",")), *hosts])
