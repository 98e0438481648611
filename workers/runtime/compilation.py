"""Compiling programs side by side, and keeping them for the next start."""

from __future__ import annotations

import concurrent.futures
import contextlib
import logging
import os
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
from jax._src import distributed

_LOG = logging.getLogger(__name__)

#: Threads that compile. XLA uses several for one program, but not all the time.
MAX_THREADS = 8


def use_cache(directory: str, rank: int) -> None:
    """Keeps compiled programs of this rank in a folder of its own: on CPU hosts they differ by rank. Before any compilation. A
    folder that can't be had costs time at the next start, and nothing else."""
    try:
        own = pathlib.Path(directory).expanduser() / f"rank{rank}"
        own.mkdir(parents=True, exist_ok=True)
    except (RuntimeError, OSError) as error:
        _LOG.warning("cluster.compilation_cache=%s: %s; nothing is kept of what is compiled", directory, error)
        return
    jax.config.update("jax_compilation_cache_dir", str(own))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)


@contextlib.contextmanager
def every_rank_writes() -> Iterator[None]:
    """Lets this rank write what it compiles meanwhile to its cache.

    JAX writes on process 0 alone, so that processes don't contend for a folder that they share. Ours don't share, and other
    ranks would compile anew at each start. JAX has no setting for it.
    """
    state = distributed.global_state
    process, state.process_id = state.process_id, 0
    try:
        yield
    finally:
        state.process_id = process


def compile_all(
    programs: Mapping[str, Callable[[], Any]], report: Callable[[float], None] = lambda _: None
) -> dict[str, Any]:
    """Compiles `programs`, several at a time; returns them by name.

    Args:
      programs: each returns what `jax.stages.Lowered.compile` does.
      report: called with the fraction that is done.
    """
    done: dict[str, Any] = {}
    threads = max(1, min(MAX_THREADS, os.cpu_count() or 1))
    with concurrent.futures.ThreadPoolExecutor(threads, "compile") as pool:
        futures = {pool.submit(compile_one): name for name, compile_one in programs.items()}
        for future in concurrent.futures.as_completed(futures):
            done[futures[future]] = future.result()
            report(len(done) / len(futures))
    return done
