"""A self-test of all hosts of a Ray cluster at once, and of what lies between them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import ray
import ray.exceptions
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cluster.service import connected
from tools.selftest.findings import Finding, Outcome
from tools.selftest.sections import Options, run_interconnect, run_sections
from workers.host.streams import free_port

#: Seconds that a host's devices may take to be free, and all that a host is asked for.
_FREE_SECONDS, _TEST_SECONDS = 60.0, 3600.0


@ray.remote(num_cpus=0, max_restarts=0)
class _Tester:
    """Holds the devices of a host while they are tested."""

    def place(self) -> str:
        """An address at which processes of a mesh can meet here."""
        address = ray.util.get_node_ip_address()
        return f"{address}:{free_port(address)}"

    def test(self, options: Options) -> list[Finding]:
        return list(run_sections(options))

    def interconnect(self, options: Options, coordinator: str, rank: int, hosts: int) -> list[Finding]:
        return run_interconnect(options, coordinator, rank, hosts)


def test_hosts(address: str, options: Options) -> Iterator[tuple[str, list[Finding]]]:
    """What each host finds, and then what all find together, with a name each. Raises OSError if no Ray cluster answers."""
    with connected(address, "selftest", _FREE_SECONDS):
        resource = options.platform.upper()
        nodes = [
            node for node in ray.nodes() if node["Alive"] and (resource == "CPU" or node["Resources"].get(resource))
        ]
        testers = {
            f"host {node['NodeManagerAddress']} ({node['NodeID'][:8]})": _tester(node, resource) for node in nodes
        }
        places = {host: tester.place.remote() for host, tester in testers.items()}
        ready, _ = ray.wait(list(places.values()), num_returns=len(places), timeout=_FREE_SECONDS)
        free = {host: testers[host] for host, place in places.items() if place in ready}
        for host in testers.keys() - free.keys():
            problem = "its devices are not free: does a service use them? `grokmesh stop` ends it"
            yield host, [Finding("host", "devices", Outcome.FAILED, problem)]
        asked = {host: tester.test.remote(options) for host, tester in free.items()}
        for host, answer in asked.items():
            yield host, _answer("host", answer)
        if len(free) > 1:
            place, count = ray.get(places[next(iter(free))]), len(free)
            together = [
                tester.interconnect.remote(options, place, rank, count) for rank, tester in enumerate(free.values())
            ]
            yield f"{count} hosts together", [f for answer in together for f in _answer("interconnect", answer)]


def _tester(node: dict[str, Any], resource: str) -> Any:
    """One that holds all devices of a node."""
    held = {} if resource == "CPU" else {resource: node["Resources"][resource]}
    strategy = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
    options: dict[str, Any] = {"scheduling_strategy": strategy, "num_gpus": held.pop("GPU", 0), "resources": held}
    return _Tester.options(**options).remote()  # type: ignore[attr-defined]


def _answer(section: str, answer: Any) -> list[Finding]:
    try:
        found: list[Finding] = ray.get(answer, timeout=_TEST_SECONDS)
    except ray.exceptions.RayError as error:
        return [Finding(section, "ends", Outcome.FAILED, str(error).strip().splitlines()[-1])]
    return found
