"""Pages that are shared, forgotten and published anew."""

from __future__ import annotations

from workers.engine.pages import PagePool


def test_pages_of_a_request_without_numbers_stay_unshared_while_another_has_them() -> None:
    pool = PagePool(9, 4)
    tokens = tuple(range(12))
    pool.take("a", (), 3)
    pool.publish("a", tokens, 12)
    shared = pool.match(tokens)
    pool.take("b", shared, 1)
    pool.forget("a")
    pool.publish("b", (*tokens, 1, 2, 3, 4), 16)
    assert pool.match(tokens) == ()
    pool.give_back("a")
    pool.publish("b", (*tokens, 1, 2, 3, 4), 16)
    assert pool.match(tokens) == ()
    pool.give_back("b")
    assert (pool.used, pool.cached, pool.free) == (0, 0, 8)


def test_what_follows_a_forgotten_page_is_published_anew_without_a_trace_of_the_old() -> None:
    pool = PagePool(9, 4)
    tokens = tuple(range(12))
    pool.take("a", (), 1)
    pool.publish("a", tokens, 4)
    pool.take("b", pool.match(tokens[:4]), 2)
    pool.publish("b", tokens, 12)
    pool.forget("a")
    pool.give_back("a")
    pool.give_back("b")
    for name in ("c", "d"):
        pool.take(name, pool.match(tokens), 3 - len(pool.match(tokens)))
        pool.publish(name, tokens, 12)
        pool.give_back(name)
    assert len(pool.match(tokens)) == 3
    pool.take("all", (), 8)
    assert pool.cached == 0
    pool.give_back("all")
    assert pool.free == 8
