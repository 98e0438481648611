"""Workers that stand by: there once a node, taken once, and never left behind."""

from __future__ import annotations

import asyncio
import types
from typing import Any

import pytest
import ray.exceptions

from cluster.controller import standbys
from cluster.controller.standbys import Standbys
from workers.messages.specs import EngineSpec, MeshSpec, ModelSpec

WHAT = (ModelSpec("demo", "/demo"), MeshSpec(), EngineSpec())


class _Host:
    """A worker on a node, whose calls fail on `dead` ones and never end on `silent` ones."""

    def __init__(self, node: str) -> None:
        self.node = node
        self.prepare = self.replace = self.progress = types.SimpleNamespace(remote=self._call)

    async def _call(self, *_: object) -> bool:
        if self.node.startswith("dead"):
            raise ray.exceptions.RayActorError(error_msg="the worker is gone")
        if self.node.startswith("silent"):
            await asyncio.Event().wait()
        return True


class _Pool(Standbys):
    def __init__(self) -> None:
        self.started: list[str] = []
        self.killed: list[str] = []
        super().__init__(self._started, lambda host: self.killed.append(host.node))

    def _started(self, node: str) -> Any:
        self.started.append(node)
        return _Host(node)


def test_one_is_started_a_node_and_taken_once() -> None:
    async def play() -> None:
        pool = _Pool()
        await pool.prepare(["a", "b"], *WHAT)
        await pool.prepare(["a", "b"], *WHAT)
        assert pool.started == ["a", "b"]
        assert await pool.answers("a", 0.05)
        assert not await pool.answers("c", 0.05)
        assert (await pool.take("a", None)).node == "a"
        assert await pool.take("a", None) is None
        await pool.prepare(["a", "b"], *WHAT)
        assert pool.started == ["a", "b", "a"]
        pool.keep({"a"})
        assert (pool.nodes, pool.killed) == ({"a"}, ["b"])

    asyncio.run(play())


@pytest.mark.parametrize("node", ["dead", "silent"])
def test_one_that_does_not_answer_is_not_taken(monkeypatch: pytest.MonkeyPatch, node: str) -> None:
    monkeypatch.setattr(standbys, "TAKE_SECONDS", 0.05)

    async def play() -> None:
        pool = _Pool()
        pool.put(node, _Host(node))
        assert not await pool.answers(node, 0.05)
        assert await pool.take(node, None) is None
        assert (pool.nodes, pool.killed) == (set(), [node])

    asyncio.run(play())


def test_one_that_has_died_is_started_again_when_it_is_looked_for() -> None:
    async def play() -> None:
        pool = _Pool()
        await pool.prepare(["dead"], *WHAT)
        assert (pool.nodes, pool.killed) == (set(), ["dead"])
        await pool.prepare(["dead"], *WHAT)
        assert pool.started == ["dead", "dead"]

    asyncio.run(play())


def test_a_mesh_takes_those_of_its_nodes_and_starts_the_others() -> None:
    async def play() -> None:
        pool = _Pool()
        for node in ("a", "b", "shared"):
            pool.put(node, _Host(node))
        new: list[int] = []

        def start(rank: int) -> Any:
            new.append(rank)
            return _Host(f"new {rank}")

        hosts = await pool.place(["b", "c", "shared"], {"a", "b", "c"}, start)
        assert [host.node for host in hosts] == ["b", "new 1", "new 2"]
        assert (sorted(new), pool.nodes) == ([1, 2], {"a", "shared"})

    asyncio.run(play())


def test_a_mesh_that_is_not_wanted_any_more_leaves_no_worker() -> None:
    async def play() -> None:
        pool = _Pool()
        for node in ("a", "silent"):
            pool.put(node, _Host(node))
        placing = asyncio.ensure_future(pool.place(["a", "silent", "new"], {"a", "silent"}, lambda _: _Host("new")))
        await asyncio.sleep(0.05)
        placing.cancel()
        await asyncio.gather(placing, return_exceptions=True)
        assert sorted(pool.killed) == ["a", "new", "silent"]
        assert not pool.nodes

    asyncio.run(play())
