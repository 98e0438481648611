"""`make simulate-mutants`: faults in the project's own code, one at a time, and how many seeds it takes to find each.

A mutant is a piece of a file that is replaced in a copy of the project. Seeds are played there until one of them shows it.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).parent.parent.parent
PACKAGES = ("cluster", "workers", "grokmesh", "proto", "tests", "models", "tools")


@dataclasses.dataclass(frozen=True)
class Mutant:
    """A fault: in `file`, `code` becomes `wrong`."""

    name: str
    file: str
    code: str
    wrong: str


MUTANTS = (
    Mutant(
        "nobody watches hosts that are asked to serve",
        "cluster/controller/replica.py",
        '_first(self._watch_hosts(placement), placement.ask("serve"))\n        await self._serve(placement, specs[0])',
        'placement.ask("serve")\n        await self._serve(placement, specs[0])',
    ),
    Mutant(
        "a controller that goes on with a mesh does not know its leader at first",
        "cluster/controller/replica.py",
        "None if running is None else _leader(running.spec)",
        "None",
    ),
    Mutant(
        "the gateway of a request that is cancelled by its name is not told",
        "workers/host/leader.py",
        "            self._refusals.setdefault(gateway, []).append(refusal)\n\n    def _forget",
        "\n    def _forget",
    ),
    Mutant(
        "a key's requests in other gateways do not count",
        "cluster/gateway/admission/admission.py",
        "everywhere = own + self._elsewhere.get(caller.name, 0)",
        "everywhere = own",
    ),
    Mutant(
        "no frame of an earlier release is read",
        "workers/messages/codec.py",
        "    return message\n",
        "    assert len(vars(message)) == len(cast(Any, kind).__dataclass_fields__)\n    return message\n",
    ),
    Mutant(
        "a mesh of too few hosts does not grow",
        "cluster/controller/replica.py",
        "if self._mesh.hosts < self._config.mesh.hosts:",
        "if False:",
    ),
    Mutant(
        "a mesh that is to grow stays where it is",
        "cluster/controller/replica.py",
        "self.outdated or self._growing or await",
        "self.outdated or await",
    ),
    Mutant(
        "a token is asked for twice",
        "cluster/gateway/session.py",
        "resumed=tuple(self._received), trial",
        "resumed=tuple(self._received[:-1]), trial",
    ),
    Mutant(
        "a score is asked for twice",
        "cluster/gateway/session.py",
        "score_from=self._unscored",
        "score_from=self.request.score_from",
    ),
    Mutant(
        "what is cached is not scored",
        "workers/engine/scheduler.py",
        "else request.score_from - 1]",
        "else len(prefix) - 1]",
    ),
    Mutant(
        "a session of a lost replica is forgotten",
        "cluster/gateway/routing/replica_link.py",
        "left = list(self.sessions.values())",
        "left = list(self.sessions.values())[1:]",
    ),
    Mutant(
        "a cancel is not passed on",
        "cluster/gateway/routing/replica_link.py",
        "            self._stream.send(LeaderInput(cancel=session.request.id))",
        "            pass",
    ),
    Mutant(
        "a place in the gateway is kept",
        "cluster/gateway/admission/admission.py",
        "self._change(caller, -count)",
        "self._change(caller, 1 - count)",
    ),
    Mutant(
        "sessions wait for a replica and are not sent when it is back",
        "cluster/gateway/routing/router.py",
        "            self._changed()\n            self._send_waiting()\n\n        try:",
        "            self._changed()\n\n        try:",
    ),
    Mutant(
        "a stream that has broken is not opened again",
        "cluster/gateway/routing/router.py",
        "            await asyncio.sleep(RECONNECT_SECONDS)",
        "            return",
    ),
    Mutant(
        "a gateway that knows nothing yet turns requests away",
        "cluster/gateway/routing/router.py",
        "self._informed = False",
        "self._informed = True",
    ),
    Mutant(
        "a leader remembers a request that has ended",
        "workers/host/leader.py",
        "        self._owners.pop(request_id, None)\n",
        "",
    ),
    Mutant(
        "what a lost gateway asked for goes on",
        "workers/host/leader.py",
        "[id for id, owner in self._owners.items() if owner is gateway]",
        "[]",
    ),
    Mutant(
        "a cancelled request keeps its slot",
        "workers/host/leader.py",
        "        self._scheduler.cancel(request_id)\n",
        "",
    ),
    Mutant(
        "steps that hang are not found",
        "workers/host/watchdog.py",
        "        if seconds < UNKNOWN_SECONDS and (working or counted < self.limit(plan)):\n            return False",
        "        return False",
    ),
    Mutant(
        "a page is published before it is full",
        "workers/engine/scheduler.py",
        "pool.publish(sequence.request.id, sequence.prefix, sequence.prefilled, ",
        "pool.publish(sequence.request.id, sequence.prefix, len(sequence.prefix), ",
    ),
    Mutant(
        "a preempted sequence forgets a token",
        "workers/engine/scheduler.py",
        "resumed=tuple(known), score",
        "resumed=tuple(known[:-1]), score",
    ),
    Mutant(
        "tokens that a resumed request has are not decoded again",
        "workers/engine/policy.py",
        "        return request.resumed\n",
        "        return ()\n",
    ),
    Mutant(
        "a row is decoded at the place before",
        "workers/engine/sequence.py",
        "row = DecodeRow(self.slot, self.position)",
        "row = DecodeRow(self.slot, self.position - 1)",
    ),
    Mutant(
        "a page leaks",
        "workers/engine/pages.py",
        "for page in reversed(self._owned.pop(owner)):",
        "for page in reversed(self._owned.pop(owner)[:-1]):",
    ),
    Mutant(
        "a shared page is given to another",
        "workers/engine/pages.py",
        "            if self._owners[page]:\n                continue\n",
        "",
    ),
    Mutant(
        "no host is ever blamed",
        "cluster/controller/replica.py",
        "        for rank in blamed:\n",
        "        for rank in list[int]():\n",
    ),
    Mutant(
        "hosts that can't reach each other are not looked for",
        "cluster/controller/placement.py",
        "        if cuts:\n",
        "        if not pairs and cuts:\n",
    ),
    Mutant(
        "no mesh is adopted",
        "cluster/controller/adoption.py",
        "if mesh is not None and mesh.spec.epoch",
        "if mesh is None and mesh.spec.epoch",
    ),
    Mutant(
        "a controller forgets the epochs of another one",
        "cluster/controller/replica.py",
        "        await self._placements.begins(self.index, self.epoch)",
        "        pass",
    ),
    Mutant(
        "one that is on trial is computed beside others",
        "workers/engine/scheduler.py",
        "return [self._trial] if self._trial is not None else list(self._running.values())",
        "return list(self._running.values())",
    ),
    Mutant(
        "a stopped follower is taken for a step that hangs",
        "workers/host/leader.py",
        "excused=server.late)",
        "excused=lambda: False)",
    ),
    Mutant(
        "workers that stand by outlive their service",
        "cluster/controller/standbys.py",
        "for node in self.nodes - nodes:\n            self._kill(self._there.pop(node))",
        "for node in self.nodes - nodes:\n            self._there.pop(node)",
    ),
    Mutant(
        "a replica that fails is not built again",
        "cluster/controller/replica.py",
        "                await self._fail(failure)",
        "                return",
    ),
)


def seeds_to_find(mutant: Mutant, most: int) -> int | None:
    """How many seeds are played until one shows the fault; None if none of `most` does."""
    with tempfile.TemporaryDirectory() as folder:
        copy = pathlib.Path(folder)
        for package in PACKAGES:
            if (ROOT / package).exists():
                shutil.copytree(
                    ROOT / package, copy / package, symlinks=True, ignore=shutil.ignore_patterns("__pycache__")
                )
        path = copy / mutant.file
        source = path.read_text()
        assert source.count(mutant.code) == 1, f"{mutant.file} must have {mutant.code!r} once"
        path.write_text(source.replace(mutant.code, mutant.wrong))
        command = [
            sys.executable,
            "-P",
            "-m",
            "tests.simulation",
            "--seeds",
            str(most),
            "--processes",
            "1",
            "--until-found",
        ]
        environment = {**os.environ, "PYTHONPATH": f"{copy}:{copy / 'proto'}", "PYTHONHASHSEED": "0"}
        done = subprocess.run(command, env=environment, cwd=copy, capture_output=True, text=True, check=False)
        found = [line for line in done.stdout.splitlines() if line.startswith("seed ")]
        return int(found[0].split()[1].rstrip(":")) + 1 if found else None


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.simulation.mutants")
    parser.add_argument("--most", type=int, default=50, help="seeds for each (default: %(default)s)")
    parser.add_argument("--only", default="", help="those whose names have this in them")
    arguments = parser.parse_args()
    missed = 0
    for mutant in MUTANTS:
        if arguments.only in mutant.name:
            seeds = seeds_to_find(mutant, arguments.most)
            missed += seeds is None
            print(
                f"{mutant.name}: " + (f"seed {seeds}" if seeds else f"not found in {arguments.most} seeds"), flush=True
            )
    print(f"{missed} were not found")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
