"""A self-test of all hosts of a Ray cluster at once, and of what lies between them."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import ray
import ray.exceptions
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cluster.controller.failures import summary
from cluster.service import connected
from tools.selftest.findings import Finding, Outcome
from tools.selftest.sections import Options, run_interconnect, run_sections
from workers.host.streams import free_port

#: Seconds that a host's devices may take to be free, and all that a host is asked for.
_FREE_SECONDS, _TEST_SECONDS = 60.0, 7200.0


@ray.remote(num_cpus=0, max_restarts=0)
class _Tester:
    """Holds the devices of a host while they are tested."""

    def place(self) -> str:
        """An address at which processes of a mesh can meet here."""
        address = ray.util.get_node_ip_address()
        return f"{address}:{free_port(address)}"

    def test(self, options: Options) -> list[Finding]:
        return list(run_sections(options))

    def interconnect(self, options: Options, coordinator: str, secret: str, rank: int, hosts: int) -> list[Finding]:
        return run_interconnect(options, coordinator, secret, rank, hosts)


def platform_of(nodes: Sequence[Mapping[str, Any]]) -> str:
    """The platform of a cluster, as Ray sees its nodes' devices."""
    return next((name for name in ("gpu", "tpu") if any(node["Resources"].get(name.upper()) for node in nodes)), "cpu")


def test_hosts(
    address: str, options_of: Callable[[str], Options], platform: str | None
) -> Iterator[tuple[str, list[Finding]]]:
    """What each host finds, and then what those that belong together find, with a name each. Raises OSError if no Ray cluster
    answers. `options_of` has them for a platform: the cluster's own, if none is given."""
    with connected(address, "selftest", _FREE_SECONDS):
        nodes = [node for node in ray.nodes() if node["Alive"]]
        options = options_of(platform or platform_of(nodes))
        resource = options.platform.upper()
        chosen = [node for node in nodes if resource == "CPU" or node["Resources"].get(resource)]
        for node in (node for node in nodes if node not in chosen):
            outcome = Outcome.SKIPPED if chosen else Outcome.FAILED
            yield _name(node), [Finding("host", "devices", outcome, f"Ray sees no {resource} here")]
        testers = {_name(node): _tester(node, resource) for node in chosen}
        places = {host: tester.place.remote() for host, tester in testers.items()}
        ready, _ = (
            ray.wait(list(places.values()), num_returns=len(places), timeout=_FREE_SECONDS) if places else ([], [])
        )
        asked = {host: testers[host].test.remote(options) for host, place in places.items() if place in ready}
        for host in testers.keys() - asked.keys():
            problem = "its devices are not free: does a service use them? `grokmesh stop` ends it"
            yield host, [Finding("host", "devices", Outcome.FAILED, problem)]
        for host, answer in asked.items():
            yield host, _answer("host", answer)
        for group in _groups([node for node in chosen if _name(node) in asked]):
            members = [testers[_name(node)] for node in group]
            yield f"{len(members)} hosts together", _together(members, options)


def _name(node: Mapping[str, Any]) -> str:
    return f"host {node['NodeManagerAddress']} ({node['NodeID'][:8]})"


def _groups(nodes: Sequence[Mapping[str, Any]]) -> list[list[Mapping[str, Any]]]:
    """The hosts that have an interconnect, in rank order, where there are several: on TPUs those of a slice."""
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for node in nodes:
        groups.setdefault(node["Labels"].get("ray.io/tpu-slice-name", ""), []).append(node)
    ranked = [
        sorted(group, key=lambda node: int(node["Labels"].get("ray.io/tpu-worker-id", 0))) for group in groups.values()
    ]
    return [group for group in ranked if len(group) > 1]


def _together(members: Sequence[Any], options: Options) -> list[Finding]:
    try:
        place = ray.get(members[0].place.remote(), timeout=_FREE_SECONDS)
    except ray.exceptions.RayError as error:
        return [Finding("interconnect", "ends", Outcome.FAILED, summary(error))]
    secret, count = secrets.token_hex(), len(members)
    asked = [tester.interconnect.remote(options, place, secret, rank, count) for rank, tester in enumerate(members)]
    return [finding for answer in asked for finding in _answer("interconnect", answer)]


def _tester(node: Mapping[str, Any], resource: str) -> Any:
    """One that holds all devices of a node."""
    held = {} if resource == "CPU" else {resource: node["Resources"][resource]}
    strategy = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
    options: dict[str, Any] = {"scheduling_strategy": strategy, "num_gpus": held.pop("GPU", 0), "resources": held}
    return _Tester.options(**options).remote()  # type: ignore[attr-defined]


def _answer(section: str, answer: Any) -> list[Finding]:
    try:
        found: list[Finding] = ray.get(answer, timeout=_TEST_SECONDS)
    except ray.exceptions.RayError as error:
        return [Finding(section, "ends", Outcome.FAILED, summary(error))]
    return found
