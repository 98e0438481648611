"""Hosts on one machine: network, process, mount, host name and IPC namespaces with an sshd in each. Needs root, and Debian's
iproute2, openssh-server, rsync and util-linux."""

from __future__ import annotations

import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

PROJECT = pathlib.Path(__file__).parent.parent.parent
START_SECONDS = 20.0

#: What process 1 of a host does: its own /proc, /root, /tmp/ray, /dev/shm, /run and /etc/hosts, then an sshd.
_INIT = """
set -e
folder=$1 name=$2 python=$3
hostname "$name"
mount -t proc proc /proc
mount --bind "$folder/hosts" /etc/hosts
mount -t tmpfs -o size=1g tmpfs /dev/shm
mkdir -p /tmp/ray && mount --bind "$folder/ray" /tmp/ray
case $python in /root/*) mkdir -p "$folder$python" && mount --rbind "$python" "$folder$python";; esac
mount --rbind "$folder/root" /root
mount -t tmpfs tmpfs /run && mkdir -p /run/sshd
cd /root && export HOME=/root
$(command -v sshd) -h "$folder/host_key" -E "$folder/sshd.log" -o PidFile=none -o StrictModes=no -o UsePAM=no -o UseDNS=no \
    -o PasswordAuthentication=no -o PermitRootLogin=prohibit-password -o MaxStartups=100
touch "$folder/up"
set +e
trap 'exit 0' TERM
while :; do sleep 3600 & wait $!; done
"""


class Hosts:
    """Hosts by name and address on one switch. The first is the operator's machine, whose key opens all others."""

    def __init__(self, folder: pathlib.Path, addresses: dict[str, str]) -> None:
        self._folder = folder
        self._addresses = addresses
        self._prefix = f"gm{os.getpid() % 100_000}-"
        self._inits: dict[str, subprocess.Popen[bytes]] = {}

    def up(self) -> None:
        """Starts the switch and all hosts."""
        switch = self._prefix + "sw"
        _run("ip", "netns", "add", switch)
        _run("ip", "-n", switch, "link", "add", "br0", "type", "bridge")
        _run("ip", "-n", switch, "link", "set", "br0", "up")
        for i, name in enumerate(self._addresses):
            self._start(i, name, switch)

    def connect(self, address: str) -> None:
        """Gives this machine an address on the switch, too."""
        port = f"gmroot{os.getpid() % 100_000}"
        _run("ip", "link", "add", port, "type", "veth", "peer", "name", "root", "netns", self._prefix + "sw")
        _run("ip", "-n", self._prefix + "sw", "link", "set", "root", "master", "br0", "up")
        _run("ip", "addr", "add", f"{address}/24", "dev", port)
        _run("ip", "link", "set", port, "up")

    def cut(self, name: str, cut: bool = True) -> None:
        """Pulls a host's plug out of the switch, or puts it in again."""
        port = f"port{list(self._addresses).index(name)}"
        _run("ip", "-n", self._prefix + "sw", "link", "set", port, "down" if cut else "up")

    def restart(self, name: str) -> None:
        """Turns a host that crashed on again, with an empty disk."""
        _run("ip", "netns", "del", self._prefix + name)
        shutil.rmtree(self._folder / name, ignore_errors=True)
        self._start(list(self._addresses).index(name), name, self._prefix + "sw")

    def down(self) -> None:
        """Ends all hosts and the switch."""
        for name in list(self._inits):
            self.crash(name)
        for name in ("sw", *self._addresses):
            subprocess.run(["ip", "netns", "del", self._prefix + name], capture_output=True, check=False)

    def execute(self, name: str, *command: str, timeout: float = 120.0) -> subprocess.CompletedProcess[str]:
        """Runs a command on a host, in the project's folder, as its user would."""
        path = f"{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}"
        environment = ["env", "-i", f"PATH={path}", "HOME=/root", "LANG=C.UTF-8", "TERM=dumb", "USER=root"]
        enter = ["nsenter", "-t", str(self._first_process(name)), "-n", "-p", "-m", "-u", "-i", f"--wd={PROJECT}"]
        return subprocess.run(
            [*enter, *environment, *command], capture_output=True, text=True, timeout=timeout, check=False
        )

    def crash(self, name: str) -> None:
        """Turns a host off without a word: its processes die at once, and its link with them."""
        init = self._inits.pop(name)
        os.kill(self._first_process_of(init), signal.SIGKILL)
        init.wait()

    def commands(self, name: str) -> list[str]:
        """The command lines of all processes on a host but process 1, sshd and their children that sleep."""
        space = (pathlib.Path("/proc") / str(self._first_process(name)) / "ns/pid").readlink()
        found = []
        for process in _processes():
            try:
                if (process / "ns/pid").readlink() == space:
                    words = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode().strip()
                    found.append(words)
            except OSError:  # gone, or not ours to look at
                continue
        return [words for words in found if words and not words.startswith(("bash -c", "sleep", "sshd"))]

    def _start(self, index: int, name: str, switch: str) -> None:
        space, folder = self._prefix + name, self._folder / name
        for part in ("root/.ssh", "ray"):
            (folder / part).mkdir(parents=True)
        lines = ["127.0.0.1 localhost", *(f"{address} {other}" for other, address in self._addresses.items())]
        (folder / "hosts").write_text("\n".join(lines) + "\n")
        (folder / "root/.bashrc").write_text(f"export PATH={pathlib.Path(sys.executable).parent}:$PATH\n")
        _run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / "host_key"))
        operator = self._folder / next(iter(self._addresses)) / "root/.ssh/id_ed25519"
        if not operator.exists():
            _run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(operator))
        shutil.copy(operator.with_suffix(".pub"), folder / "root/.ssh/authorized_keys")

        _run("ip", "netns", "add", space)
        _run("ip", "-n", space, "link", "add", "eth0", "type", "veth", "peer", "name", f"port{index}", "netns", switch)
        _run("ip", "-n", switch, "link", "set", f"port{index}", "master", "br0", "up")
        # The same after a restart: others remember it.
        _run("ip", "-n", space, "link", "set", "eth0", "address", f"02:00:00:00:00:{index:02x}")
        _run("ip", "-n", space, "addr", "add", f"{self._addresses[name]}/24", "dev", "eth0")
        for link in ("lo", "eth0"):
            _run("ip", "-n", space, "link", "set", link, "up")
        unshare = [
            "unshare",
            "--pid",
            "--fork",
            "--mount",
            "--uts",
            "--ipc",
            "--kill-child",
            "--propagation",
            "private",
        ]
        command = ["bash", "-c", _INIT, "init", str(folder), name, sys.base_prefix]
        with (folder / "init.log").open("wb") as log:
            self._inits[name] = subprocess.Popen(
                ["ip", "netns", "exec", space, *unshare, *command],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip
        deadline = time.monotonic() + START_SECONDS
        while not (folder / "up").exists():
            assert time.monotonic() < deadline, (folder / "init.log").read_text()
            time.sleep(0.02)

    def _first_process(self, name: str) -> int:
        return self._first_process_of(self._inits[name])

    def _first_process_of(self, init: subprocess.Popen[Any]) -> int:
        children = pathlib.Path(f"/proc/{init.pid}/task/{init.pid}/children").read_text().split()
        return int(children[0])


def _processes() -> Iterator[pathlib.Path]:
    return (path for path in pathlib.Path("/proc").iterdir() if path.name.isdecimal())


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(command)}: {done.stderr}"
