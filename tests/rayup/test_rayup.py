"""`ray up deploy/cluster.yaml`, unchanged, onto three hosts with addresses, sshd and processes of their own."""

from __future__ import annotations

import os
import pathlib
import re
import time
from collections.abc import Callable, Iterator

import pytest

from tests.rayup.hosts import Hosts
from tests.support.debian import require
from tests.support.waiting import wait_until

CLUSTER = "deploy/cluster.yaml"
HOSTS = {"operator": "192.168.1.9", "h0": "192.168.1.10", "h1": "192.168.1.11", "h2": "192.168.1.12"}
GATEWAY = f"{HOSTS['h0']}:50051"


@pytest.fixture
def hosts(tmp_path: pathlib.Path) -> Iterator[Hosts]:
    if os.geteuid() != 0:
        pytest.skip("needs root to make namespaces")
    require(ip="iproute2", unshare="util-linux", sshd="openssh-server", rsync="rsync")
    made = Hosts(tmp_path, HOSTS)
    try:
        made.up()
        yield made
    finally:
        made.down()


def test_up_serve_lose_a_host_down(hosts: Hosts, capsys: pytest.CaptureFixture[str]) -> None:
    began = time.monotonic()

    def say(what: str) -> None:
        with capsys.disabled():
            print(f"\n{time.monotonic() - began:5.1f} s  {what}", end="", flush=True)

    def operator(*command: str, timeout: float = 120.0) -> str:
        done = hosts.execute("operator", *command, timeout=timeout)
        return done.stdout + done.stderr

    def status() -> str:
        return operator("grokmesh", "status", "--address", GATEWAY)

    def ready(epoch: int) -> Callable[[], bool]:
        def reached() -> bool:
            found = re.search(r"replica 0: ready, epoch (\d+)", status())
            return found is not None and int(found[1]) >= epoch

        return reached

    def generate() -> str:
        done = hosts.execute(
            "operator", "grokmesh", "generate", "In the beginning", "--address", GATEWAY, "--max-tokens", "24", "--seed", "7"
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert hosts.execute("operator", "ray", "get-auth-token", "--generate").returncode == 0
    up = hosts.execute("operator", "ray", "up", "--yes", "--no-config-cache", CLUSTER, timeout=240)
    assert up.returncode == 0, up.stdout + up.stderr
    say("ray up has returned")
    assert "model grokmesh-demo" in status(), "the gateway answers when ray up returns"
    wait_until(ready(1), 120, status, pause=0.5)
    say("ready")
    assert operator("grokmesh", "health", "--address", GATEWAY).strip() == "serving"
    text = generate()
    assert text.strip()
    first = status()
    assert "mesh 2 x 2" in first

    members = re.findall(r"host \d: (192\.168\.1\.\d+) pid", first)
    assert len(set(members)) == 2
    lost = next(name for name, address in HOSTS.items() if address in members and address != HOSTS["h0"])
    hosts.crash(lost)
    say(f"{lost} is off")
    wait_until(lambda: not ready(1)(), 20, status, pause=0.5)
    say("the loss is noticed")
    wait_until(ready(2), 120, status, pause=0.5)
    say("ready again")
    assert HOSTS[lost] not in "".join(re.findall(r"host \d: \S+", status()))
    assert generate() == text

    down = hosts.execute("operator", "ray", "down", "--yes", CLUSTER)
    assert down.returncode == 0, down.stdout + down.stderr
    say("ray down has returned")
    left = [name for name in ("h0", "h1", "h2") if name != lost]
    wait_until(
        lambda: not any(hosts.commands(name) for name in left),
        90,
        lambda: str([hosts.commands(n) for n in left]),
        pause=0.5,
    )
    say("nothing is left\n")
