"""The planner's word on a configuration before anything is started. Without JAX."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import pathlib

from cluster.config.schema import Config, ConfigError, check_model, problems
from workers.capacity import hardware as hw
from workers.capacity.hardware import GIB
from workers.capacity.memory import Precision, whole_bytes
from workers.capacity.planner import (
    layout_of,
    pages_that_fit,
)
from workers.capacity.report import DISK, OBJECT_STORE
from workers.model.config import GrokConfig

_LOG = logging.getLogger(__name__)

#: Seconds that requests wait for a lost replica at the least.
LEAST_FAILOVER = 120.0
#: Bytes a second that a CPU host packs for its kernels.
PACKING = 0.5e9


def with_pages(config: Config, model: GrokConfig, path: pathlib.Path) -> Config:
    """The configuration with as many KV pages as memory has room for, if it names no number.

    Where nothing is known of the hardware, it is left as it is.

    Raises:
      ConfigError: the model, or the pages that are asked for, do not fit.
    """
    hardware = _hardware(config)
    if hardware is None:
        return config
    mesh, engine = config.mesh, config.engine
    precision = Precision(
        config.model.weights, config.model.activations, config.model.kv_cache or config.model.activations
    )
    layout = layout_of(model, mesh.data, mesh.model, mesh.rules)
    context, groups = engine.context or model.sequence_len, layout.batch_groups
    asked = None if engine.kv_pages is None else engine.kv_pages // groups
    pages, memory = pages_that_fit(
        model, layout, precision, hardware,
        slots=engine.slots, context=context, page_size=engine.page_size, chunk=engine.prefill_chunk, most=asked,
    )  # fmt: skip
    wanted = 1 + -(-context // engine.page_size) if asked is None else asked
    if pages < wanted:
        free = hardware.device.memory - memory.total + memory.kv_pages
        raise ConfigError(
            f"{path}: does not fit {hardware}: of {hardware.device.memory / GIB:.2f} GiB of a device {precision.weights} "
            f"weights take {memory.weights / GIB:.2f}, programs and sampling {(memory.programs + memory.sampling) / GIB:.2f}, "
            f"which leaves {max(free, 0) / GIB:.2f} for {wanted} KV pages a group, of which {max(pages, 0)} would fit; "
            "use more devices, fewer bits, fewer engine.slots or a shorter engine.context (`grokmesh plan` says which)"
        )
    if asked is not None:
        return config
    full = engine.slots // groups * -(-context // engine.page_size) + 1
    if pages < full:
        _LOG.info("memory has room for %d of the %d KV pages that all slots could fill", pages * groups, full * groups)
    return dataclasses.replace(config, engine=dataclasses.replace(engine, kv_pages=pages * groups))


def smaller_configs(config: Config, model: GrokConfig, path: pathlib.Path) -> tuple[Config, ...]:
    """A configuration for each number of hosts from `mesh.hosts` - 1 down to `mesh.smallest` on which the model fits; of
    several the one with the longest `model` axis.

    Raises:
      ConfigError: it is not known what fits.
    """
    mesh, found = config.mesh, []
    if mesh.smallest is None or mesh.smallest == mesh.hosts:
        return ()
    if _hardware(config) is None:
        setting = "cluster.accelerator" if mesh.platform == "gpu" else "cluster.memory_per_host"
        raise ConfigError(f"{path}: mesh.smallest={mesh.smallest} needs {setting}: else it is not known what fits")
    cluster = dataclasses.replace(config.cluster, memory_per_host=_memory_per_host(config))
    for hosts in range(mesh.hosts - 1, mesh.smallest - 1, -1):
        devices = hosts * mesh.devices_per_host
        if model.ffn_size % devices or model.vocab_size % devices:
            continue
        for size in range(devices, 0, -1):
            smaller = dataclasses.replace(mesh, hosts=hosts, data=devices // size, model=size)
            tried = dataclasses.replace(config, mesh=smaller, cluster=cluster)
            if devices % size or any(problems(tried)):
                continue
            with contextlib.suppress(ConfigError):
                check_model(tried, model, path)
                found.append(dataclasses.replace(with_pages(tried, model, path), cluster=config.cluster))
                break
    if not found:
        _LOG.warning("mesh.smallest=%d: the model does not fit fewer than %d hosts", mesh.smallest, mesh.hosts)
    return tuple(found)


def with_failover(config: Config, model: GrokConfig) -> Config:
    """The configuration with a `gateway.failover_seconds` in which a replica that has lost a host can load the model again."""
    if config.gateway.failover_seconds is not None:
        return config
    rate = OBJECT_STORE if "://" in config.model.checkpoint else DISK
    if config.mesh.platform == "cpu":
        rate = min(rate, PACKING)
    loading = whole_bytes(model, "int8") / (config.mesh.smallest or config.mesh.hosts) / rate
    seconds = max(LEAST_FAILOVER, 60 + 2 * loading)
    if seconds > LEAST_FAILOVER:
        _LOG.info("a host reads the model in about %.0f s: requests wait for a lost replica %.0f s", loading, seconds)
    return dataclasses.replace(config, gateway=dataclasses.replace(config.gateway, failover_seconds=seconds))


def _hardware(config: Config) -> hw.Hardware | None:
    """What the configuration says of the hardware, if that is enough."""
    cluster, mesh = config.cluster, config.mesh
    if mesh.platform == "tpu":
        return hw.pod_type(cluster.tpu_pod_type) if cluster.tpu_pod_type else None
    if mesh.platform == "gpu":
        return (
            hw.gpu_hosts(f"{mesh.devices_per_host}x{cluster.accelerator}", mesh.hosts) if cluster.accelerator else None
        )
    memory = _memory_per_host(config)
    return None if memory is None else hw.cpu_hosts(memory * 1e9 / mesh.devices_per_host, 1.0, 1.0, mesh.hosts)


def _memory_per_host(config: Config) -> float | None:
    """GB of a CPU host, if that is known."""
    cluster = config.cluster
    if cluster.memory_per_host is not None or cluster.address != "local":
        return cluster.memory_per_host
    whole = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9
    return whole / (config.mesh.hosts * config.replicas)
