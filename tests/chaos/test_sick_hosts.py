"""Broken hosts that answer, and requests that break whatever computes them: each costs a few epochs, and nobody else."""

from __future__ import annotations

import concurrent.futures
import os
import pathlib
import signal
import time

import grpc
import pytest

from grok.serving.v1 import cluster_pb2
from grokmesh import Client, Completion
from tests.chaos import namespaces
from tests.chaos.poison.sitecustomize import POISON
from tests.conftest import DEMO
from tests.support.service import running
from tests.support.waiting import wait_until

HERE = pathlib.Path(__file__).parent
ONE_HOST = {"hosts": 1, "devices_per_host": 1, "data": 1, "model": 1}
#: Seconds until a spare host serves: a host that hangs is given a minute to read something.
SECONDS = {"truncated": 60, "changed": 60, "hanging": 180}
KINDS = tuple(SECONDS) if "GROKMESH_FAULTS" in os.environ else ("changed",)


def _break(cluster: namespaces.Cluster, name: str, kind: str, folder: pathlib.Path) -> None:
    """Gives a host a copy of a tensor file that ends too early, has other bits in each rank's part, or is never read to its
    end."""
    tensor, broken = DEMO / "ckpt-0" / "tensor00002_000", folder / "broken"
    content = bytearray(tensor.read_bytes())
    if kind == "hanging":
        os.mkfifo(broken)
    elif kind == "changed":
        for place in range(len(content) // 4, 3 * len(content) // 4, 256):
            content[place] ^= 1
        broken.write_bytes(content)
    else:
        broken.write_bytes(content[: len(content) // 2])
    done = cluster.hosts.execute(name, "mount", "--bind", str(broken), str(tensor))
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("kind", KINDS)
def test_a_spare_host_takes_the_place_of_one_whose_copy_of_the_model_is_broken(
    kind: str, tmp_path: pathlib.Path
) -> None:
    if not namespaces.possible():
        pytest.skip("needs root to make namespaces")
    with namespaces.cluster(tmp_path) as cluster:
        replica = cluster.status().replicas[0]
        # Both ranks' standbys have opened the checkpoint by the time that all is quiet.
        time.sleep(10)
        sick = cluster.name_of(replica.hosts[1].address)
        _break(cluster, sick, kind, tmp_path)
        began = time.monotonic()
        cluster.kill(replica.hosts[1], signal.SIGKILL)

        def healed() -> bool:
            now = cluster.status().replicas[0]
            names = [cluster.name_of(host.address) for host in now.hosts]
            return now.state == cluster_pb2.REPLICA_STATE_READY and now.epoch > replica.epoch and sick not in names

        wait_until(healed, SECONDS[kind], lambda: cluster.status().replicas[0])
        attempts = cluster.status().replicas[0].epoch - replica.epoch
        print(f"{kind}: the spare host serves at attempt {attempts}, after {time.monotonic() - began:.1f} s")
        assert attempts <= 3
        with Client(cluster.address) as client:
            assert client.complete("In the beginning", max_tokens=4).finish_reason


def test_a_request_that_breaks_whatever_computes_it_takes_no_other_with_it(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(HERE / "poison"))
    with running(tmp_path, mesh=ONE_HOST) as service, Client(service.address, attempts=1) as client:
        alone = [client.complete([10 + i, 11, 12], max_tokens=150, seed=i, ignore_eos=True) for i in range(15)]

        def innocent(i: int) -> Completion:
            return client.complete([10 + i, 11, 12], max_tokens=150, seed=i, ignore_eos=True)

        with concurrent.futures.ThreadPoolExecutor(16) as pool:
            others = [pool.submit(innocent, i) for i in range(15)]
            time.sleep(0.2)
            guilty = pool.submit(client.complete, [POISON, 11, 12], max_tokens=150, ignore_eos=True)
            with pytest.raises(grpc.RpcError, match="it must be why"):
                guilty.result()
            together = [other.result() for other in others]
        assert [c.tokens for c in together] == [c.tokens for c in alone]
        epoch = service.status().replicas[0].epoch
        print(f"0 of 15 others failed; {epoch - 1} epochs were lost")
        assert epoch <= 6
