"""Sessions go where their prefix is, and load stays even."""

from __future__ import annotations

import collections
import random

import pytest

from cluster.gateway.routing.affinity import BOUND, PREFIX_TOKENS, choose, prefix_key, ranked


def _key(seed: int) -> bytes:
    rng = random.Random(seed)
    key = prefix_key([rng.randrange(1000) for _ in range(PREFIX_TOKENS)])
    assert key is not None
    return key


def test_prompts_that_begin_alike_have_one_key_and_short_ones_none() -> None:
    beginning = list(range(PREFIX_TOKENS))
    assert prefix_key([*beginning, 5]) == prefix_key(tuple(beginning))
    assert prefix_key([1, *beginning]) != prefix_key(beginning)
    assert prefix_key(beginning[:-1]) is None


def test_a_replica_that_comes_or_goes_moves_only_its_own_prefixes() -> None:
    for seed in range(200):
        three, two = ranked(_key(seed), [0, 1, 2]), ranked(_key(seed), [2, 0])
        assert [replica for replica in three if replica != 1] == two
    first = collections.Counter(ranked(_key(seed), range(4))[0] for seed in range(2000))
    assert all(400 < count < 600 for count in first.values())


def test_a_prefix_stays_where_it_is_while_load_is_even() -> None:
    home = ranked(_key(1), [0, 1])[0]
    assert choose(_key(1), 100, {0: 0, 1: 0}) == (home, "prefix")
    assert choose(_key(1), 100, {home: 300, 1 - home: 200}) == (home, "prefix")
    assert choose(_key(1), 100, {home: 2000, 1 - home: 0}) == (1 - home, "load")


def test_without_a_prefix_the_least_busy_is_chosen() -> None:
    assert choose(None, 10, {3: 50, 4: 40, 5: 40}) == (4, "load")
    assert choose(None, 10, {7: 10**9}) == (7, "only")
    assert choose(_key(1), 10, {7: 10**9}) == (7, "only")


@pytest.mark.parametrize("replicas", [2, 3, 5])
def test_no_replica_gets_much_more_than_its_part(replicas: int) -> None:
    """Requests of 64 prefixes, some of them far more popular than others, of which 20 are there at any time."""
    rng = random.Random(replicas)
    outstanding = dict.fromkeys(range(replicas), 0)
    running: collections.deque[tuple[int, int]] = collections.deque()
    homes: dict[int, int] = {}
    found = 0
    for _ in range(4000):
        prefix, cost = min(int(rng.paretovariate(0.6)), 64), rng.randint(50, 150)
        replica, _ = choose(_key(prefix), cost, outstanding)
        found += homes.get(prefix) == replica
        homes.setdefault(prefix, replica)
        outstanding[replica] += cost
        running.append((replica, cost))
        assert outstanding[replica] <= BOUND * sum(outstanding.values()) / replicas + 150
        if len(running) > 20:
            ended, cost = running.popleft()
            outstanding[ended] -= cost
    assert found > 4000 / replicas
