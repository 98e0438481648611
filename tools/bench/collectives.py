"""How long a sum over CPU devices of several processes takes, and how soon the others know that one is lost.

python -m tools.bench.collectives [--size 24576]
python -m tools.bench.collectives --losses 100

Processes of one machine exchange through memory, those in network namespaces of their own (which need root) over TCP.
"""

from __future__ import annotations

import argparse
import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import numpy as np

from workers.host.streams import free_port

#: Sums of a program, one after the other, and programs that are timed.
SUMS, PROGRAMS = 16, 3000
SECRET = b"of these processes"
SILENCE_SECONDS = 1.5
JOIN_SECONDS = 60.0
_NETWORK = f"10.204.{os.getpid() % 250}"


def take_part(coordinator: str, rank: int, ranks: int, size: int, programs: int) -> None:
    """One process, with one device: adds up arrays of `size` bytes and prints how long that takes; without a number of
    `programs`, until one is lost."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import PartitionSpec

    from workers.host.rendezvous import meet
    from workers.kernels.cpu.kernels import native_kernels
    from workers.kernels.interface import Site
    from workers.model.config import GrokConfig
    from workers.model.partition import Partition
    from workers.runtime.mesh import make_mesh

    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 1)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(
        coordinator, ranks, rank, coordinator_bind_address=coordinator, cluster_detection_method="deactivate"
    )
    mesh = make_mesh(1, ranks)
    partition = Partition.create(GrokConfig(), mesh, "tensor", native_kernels())
    meet(coordinator, rank, SECRET, SILENCE_SECONDS, JOIN_SECONDS)

    def means(x: jax.Array) -> jax.Array:
        def mean(_: int, x: jax.Array) -> jax.Array:
            return partition.sum(x, mesh.axis_names, Site.EXPERTS) / ranks

        found: jax.Array = jax.lax.fori_loop(0, SUMS, mean, x + jax.lax.axis_index(mesh.axis_names))
        return found

    whole = PartitionSpec()
    program = jax.jit(partition.on_parts(means, whole, whole))
    x = jnp.zeros(size // 4)

    def run() -> float:
        began = time.perf_counter()
        found = program(x).block_until_ready()
        seconds = time.perf_counter() - began
        assert (np.asarray(found.addressable_data(0)) == (ranks - 1) / 2).all()
        return seconds / SUMS

    run()
    if not programs:
        print("ready", flush=True)
        try:
            while True:
                run()
        except Exception as error:
            print(time.monotonic(), str(error).splitlines()[0], flush=True)
        time.sleep(60)  # its connections stay
        return
    times = [run() for _ in range(programs)]
    if rank == 0:
        print(*(np.percentile(times, share) * 1e6 for share in (50, 99)))


class Mesh:
    """Processes that take part, by rank: in memory's reach of each other, or in namespaces of their own that a bridge connects,
    which then can be cut."""

    def __init__(self, ranks: int, size: int, *, programs: int = PROGRAMS, apart: bool = False) -> None:
        self._bridge = f"sums{os.getpid()}" if apart else None
        self._spaces = [f"sums{os.getpid()}-{rank}" for rank in range(ranks)] if apart else []
        self.processes: list[subprocess.Popen[str]] = []
        self._ranks = ranks
        self._options = ["--size", str(size), "--programs", str(programs)]

    def __enter__(self) -> Mesh:
        if self._bridge is not None:
            _ip("link", "add", self._bridge, "type", "bridge")
            _ip("link", "set", self._bridge, "up")
        for rank, space in enumerate(self._spaces):
            _ip("netns", "add", space)
            _ip("link", "add", self._port(rank), "type", "veth", "peer", "name", "eth0", "netns", space)
            _ip("link", "set", self._port(rank), "master", str(self._bridge), "up")
            _ip("-n", space, "addr", "add", f"{_NETWORK}.{10 + rank}/24", "dev", "eth0")
            for device in ("lo", "eth0"):
                _ip("-n", space, "link", "set", device, "up")
        coordinator = f"{_NETWORK}.10:29000" if self._spaces else f"127.0.0.1:{free_port('127.0.0.1')}"
        for rank in range(self._ranks):
            command = [sys.executable, "-m", "tools.bench.collectives", *self._options]
            command += ["--take-part", coordinator, str(rank), str(self._ranks)]
            if self._spaces:
                alone = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc"]
                command = ["ip", "netns", "exec", self._spaces[rank], *alone, *command]
            self.processes.append(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            process.kill()
            process.communicate()
        for rank, space in enumerate(self._spaces):
            _ip("link", "del", self._port(rank))
            _ip("netns", "del", space)
        if self._bridge is not None:
            _ip("link", "del", self._bridge)

    def read(self, rank: int) -> str:
        """The next line that a rank prints. Raises RuntimeError if it has ended."""
        process = self.processes[rank]
        assert process.stdout is not None
        while (line := process.stdout.readline()).startswith("[Gloo]"):
            pass
        if not line:
            raise RuntimeError(f"rank {rank} has ended: {process.communicate()[1][-2000:]}")
        return line

    def noticed(self, rank: int) -> float:
        """When a rank that adds up for ever noticed a loss."""
        try:
            when, reason = self.read(rank).split(" ", 1)
        except RuntimeError as error:
            if "coordination service" not in str(error):  # with rank 0, JAX ends all others
                raise
            return time.monotonic()
        if "a host of the mesh is lost" not in reason:
            raise RuntimeError(f"rank {rank}: {reason}")
        return float(when)

    def signal(self, rank: int, number: signal.Signals) -> None:
        """Sends a signal to a rank's process itself."""
        pid = self.processes[rank].pid
        children = pathlib.Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        os.kill(int(children[0]) if self._spaces else pid, number)

    def cut(self, rank: int) -> None:
        """Pulls the plug of a rank in a namespace of its own."""
        _ip("link", "set", self._port(rank), "down")

    def _port(self, rank: int) -> str:
        return f"s{rank}-{os.getpid()}"


def lose(rank: int, ranks: int, how: str, size: int) -> float:
    """Kills, stops or cuts a rank while all add up. Seconds until the last of the others has an error."""
    with Mesh(ranks, size, programs=0, apart=how == "cut") as mesh:
        for other in range(ranks):
            mesh.read(other)
        time.sleep(random.random() / 2)
        lost = time.monotonic()
        if how == "cut":
            mesh.cut(rank)
        else:
            mesh.signal(rank, signal.SIGKILL if how == "kill" else signal.SIGSTOP)
        return max(mesh.noticed(other) for other in range(ranks) if other != rank) - lost


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True)


def main() -> None:
    """Prints microseconds of a sum, median and 99th percentile; or seconds until losses were noticed."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--size", type=int, default=24576)
    parser.add_argument("--losses", type=int)
    parser.add_argument("--take-part", nargs=3)
    parser.add_argument("--programs", type=int, default=PROGRAMS)
    arguments = parser.parse_args()
    if arguments.take_part:
        coordinator, rank, ranks = arguments.take_part
        take_part(coordinator, int(rank), int(ranks), arguments.size, arguments.programs)
    elif arguments.losses:
        for how in ("kill", "stop", "cut"):
            seconds = [lose(i % 3, 3, how, arguments.size) for i in range(arguments.losses // 3 + 1)]
            print(
                f"{how}: {len(seconds)} noticed by all others, median {np.median(seconds):.2f} s, most {max(seconds):.2f} s"
            )
    else:
        for ranks, apart in ((2, False), (4, False), (2, True)):
            with Mesh(ranks, arguments.size, apart=apart) as mesh:
                median, most = map(float, mesh.read(0).split())
            way = "TCP between namespaces" if apart else "memory"
            print(
                f"{arguments.size} bytes, {ranks} ranks, {way}: {median:.1f} us, 99th percentile {most:.1f}", flush=True
            )


if __name__ == "__main__":
    main()
