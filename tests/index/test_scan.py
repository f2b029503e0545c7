"""The scanning kernel against float64 brute force: every dtype, every product, ties, masks, chunks."""

from __future__ import annotations

import itertools
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import retrac_scale as rs
from retrac_scale.index import approximate
from retrac_scale.index.approximate import product_of
from retrac_scale.index.chunk import Chunk
from retrac_scale.index.plain import FREE_QUERIES, Light
from retrac_scale.index.scan import merge, scores, top
from retrac_scale.native import amx, int8, paired

DTYPES = ("int8", "float16", "float32")


def random_rows(rng: Any, c: int, n: int, k: int, dtype: str, distinct: int) -> tuple[list[Any], Any]:
    """c arrays of rows, some equal and some zero, and scales `[c, n]`."""
    pool = rng.standard_normal((c, distinct, k))
    pool[:, 0] = 0
    rows = pool[:, rng.integers(0, distinct, n)]
    if dtype == "int8":
        rows = np.rint(rows * 127 / np.abs(rows).max(initial=1e-9))
    scale = rng.choice([0.5, 1.0, -2.0], c).astype(np.float32)[:, None].repeat(n, 1)
    return list(rows.astype(dtype)), scale


def as_chunks(
    rows: list[Any], scale: Any, ids: Any, cuts: Any, kept: bool, mask: Any = None, of: Any = None
) -> list[Chunk]:
    norm = np.abs(scale) * np.stack([np.linalg.norm(r.astype(np.float64), axis=1) for r in rows]) * (1 + 1e-6)
    edges = [0, *cuts, len(ids)]
    return [
        Chunk(
            [r[a:b] for r in rows],
            scale[:, a:b],
            norm[:, a:b].astype(np.float32),
            ids[a:b],
            mask=None if mask is None else mask[..., a:b],
            kept=kept,
            of=of,
        )
        for a, b in itertools.pairwise(edges)
        if b > a
    ]


def brute_force(rows: list[Any], scale: Any, queries: Any) -> Any:
    """Float64 scores `[q, n]`, a sum in the same order for every row, so that equal rows have equal scores."""
    return sum(
        np.stack(
            [np.einsum("nk,nk->n", r.astype(np.float64), np.tile(q.astype(np.float64), (len(r), 1))) for q in query]
        )
        * s
        for r, s, query in zip(rows, scale, queries, strict=True)
    )


def check(found: Any, expected: Any, ids: Any, k: int) -> None:
    for lane, row in enumerate(expected):
        order = np.lexsort((ids, -row))[:k]
        order = order[row[order] > -np.inf]
        np.testing.assert_array_equal(found.ids[lane, : len(order)], ids[order])
        np.testing.assert_allclose(found.scores[lane, : len(order)], row[order], rtol=1e-12, atol=1e-15)
        assert (found.scores[lane, len(order) :] == -np.inf).all()


@settings(max_examples=60)
@given(data=st.data())
def test_the_order_is_that_of_float64_brute_force(data: Any) -> None:
    draw = data.draw
    rng = np.random.default_rng(draw(st.integers(0, 10**6)))
    n, q, k = draw(st.integers(1, 400)), draw(st.sampled_from([1, 3, 17])), draw(st.sampled_from([8, 40, 600]))
    c, best = draw(st.integers(1, 3)), draw(st.sampled_from([1, 7, 500]))
    rows, scale = random_rows(rng, c, n, k, draw(st.sampled_from(DTYPES)), draw(st.sampled_from([2, 30, 1000])))
    queries = rng.standard_normal((c, q, k)).astype(np.float32) * np.float32(10.0 ** rng.integers(-6, 6))
    ids = rng.permutation(2 * n)[:n]
    filters = draw(st.integers(0, 4))  # of several, each query has one
    mask = rng.random((filters, n)) < rng.random((filters, 1)) if filters > 1 else rng.random(n) < 0.4
    of = rng.integers(0, filters, q) if filters > 1 else None
    cuts = np.unique(rng.integers(0, n, draw(st.integers(0, 3))))
    signs = draw(st.sampled_from([(1,), (-1,), (1, -1)]))
    query_ids = rng.choice(ids, q) if draw(st.booleans()) else None
    chunks = as_chunks(rows, scale, ids, cuts, draw(st.booleans()), mask if filters else None, of)
    found = top(chunks, queries, best, signs=signs, query_ids=query_ids)
    expected = brute_force(rows, scale, queries)
    if filters:
        expected[~(mask[None] if of is None else mask[of]).repeat(q if of is None else 1, 0)] = np.nan
    if query_ids is not None:
        expected[ids[None] == query_ids[:, None]] = np.nan
    lanes = np.concatenate([sign * expected for sign in signs])
    check(found, np.where(np.isnan(lanes), -np.inf, lanes), ids, best)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("q", [2, 20])
def test_long_scans_with_many_near_ties_lose_nothing(dtype: str, q: int) -> None:
    rng = np.random.default_rng(0)
    rows, scale = random_rows(rng, 1, 9000, 1024, dtype, 9000)
    rows[0][:2000] = rows[0][2000:4000]  # every one of these has an equal far away
    queries = rng.standard_normal((1, q, 1024)).astype(np.float32)
    ids = rng.permutation(9000)
    found = top(as_chunks(rows, scale, ids, [4000, 4500], kept=True), queries, 50)
    check(found, brute_force(rows, scale, queries), ids, 50)


def test_equal_samples_are_ordered_by_id_however_many_there_are() -> None:
    rows = [np.tile(np.arange(-20, 20, dtype=np.int8), (6000, 1))]
    ids = np.random.default_rng(1).permutation(6000)
    queries = np.ones((1, 2, 40), np.float32)
    found = top(as_chunks(rows, np.ones((1, 6000), np.float32), ids, [3000], kept=True), queries, 4)
    assert found.ids.tolist() == [[0, 1, 2, 3]] * 2


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("q", [1, 20])
def test_cpus_without_int8_and_bfloat16_products_give_the_same_answer(
    monkeypatch: pytest.MonkeyPatch, dtype: str, q: int
) -> None:
    rng = np.random.default_rng(2)
    rows, scale = random_rows(rng, 2, 700, 300, dtype, 700)
    queries, ids = rng.standard_normal((2, q, 300)).astype(np.float32), np.arange(700)
    here = top(as_chunks(rows, scale, ids, [], kept=True), queries, 20)
    monkeypatch.setattr(approximate, "_fastest", approximate._fastest.__wrapped__)  # without what it remembers
    others = []
    for module, name, value in (
        (amx, "AVAILABLE", False),
        (int8, "AVAILABLE", False),
        (paired, "AVAILABLE", False),
        (torch.cpu, "_is_avx512_bf16_supported", lambda: False),
    ):
        monkeypatch.setattr(module, name, value)
        others.append(top(as_chunks(rows, scale, ids, [], kept=True), queries, 20))
    for other in others:
        np.testing.assert_array_equal(other.ids, here.ids)
        np.testing.assert_array_equal(other.scores, here.scores)


def test_products_are_timed_by_one_query_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    timed: list[int] = []

    class Slow:
        def weighted(self, rows: Any, scale: Any) -> None:
            timed.append(threading.get_ident())
            time.sleep(0.01)

    monkeypatch.setattr(approximate, "_ways", lambda *_: [lambda *_: Slow()] * 2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    asked = np.ones((2, 991)), np.ones(2), np.dtype("int8"), 1  # of a width that no other test has
    with ThreadPoolExecutor(4) as threads:
        made = [threads.submit(product_of, *asked) for _ in range(4)]
    assert all(isinstance(one.result(), Slow) for one in made)
    assert len({*timed}) == 1


def test_rows_too_wide_for_int32_sums_at_full_precision_are_still_exact() -> None:
    rng = np.random.default_rng(3)
    k = 2**18
    rows = [np.full((40, k), 127, np.int8) * np.sign(rng.standard_normal((40, 1))).astype(np.int8)]
    rows[0][:, :100] = rng.integers(-127, 128, (40, 100))
    queries, ids = np.ones((1, 1, k), np.float32), np.arange(40)
    scale = np.ones((1, 40), np.float32)
    found = top(as_chunks(rows, scale, ids, [], kept=True), queries, 5)
    check(found, brute_force(rows, scale, queries), ids, 5)


def test_rows_too_wide_for_any_int32_sum_are_scored_by_floats() -> None:
    k = 17_000_000
    rows = [np.full((3, k), 127, np.int8)]
    rows[0][:, 0] = 1, 3, 2
    scale = np.ones((1, 3), np.float32)
    found = top(as_chunks(rows, scale, np.arange(3), [], kept=True), np.ones((1, 1, k), np.float32), 2)
    assert found.ids.tolist() == [[1, 2]]
    assert found.scores.tolist() == [[127.0 * (k - 1) + 3, 127.0 * (k - 1) + 2]]


@given(seed=st.integers(0, 99), cuts=st.lists(st.integers(1, 199), max_size=4, unique=True))
def test_answers_of_runs_merge_to_the_answer_of_the_whole(seed: int, cuts: list[int]) -> None:
    rng = np.random.default_rng(seed)
    rows, scale = random_rows(rng, 2, 200, 16, "int8", 20)
    queries, ids = rng.standard_normal((2, 3, 16)).astype(np.float32), rng.permutation(200)
    chunks = as_chunks(rows, scale, ids, sorted(cuts), kept=True)
    whole, parts = top(chunks, queries, 9), [top([chunk], queries, 9) for chunk in chunks]
    merged = merge(parts, 9)
    np.testing.assert_array_equal(merged.ids, whole.ids)
    np.testing.assert_array_equal(merged.scores, whole.scores)


@pytest.mark.parametrize("dtype", DTYPES)
def test_all_scores_equal_brute_force(dtype: str) -> None:
    rng = np.random.default_rng(4)
    rows, scale = random_rows(rng, 2, 700, 64, dtype, 700)
    queries = rng.standard_normal((2, 3, 64)).astype(np.float32)
    (chunk,) = as_chunks(rows, scale, np.arange(700), [], kept=False)
    expected = brute_force(rows, scale, queries)
    tolerance = 1e-12 if dtype == "float32" else 1e-5
    np.testing.assert_allclose(scores(chunk, queries), expected, atol=tolerance * np.abs(expected).max())


@pytest.mark.parametrize("kept", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_scores_are_taken_apart_by_the_parts_of_rows(dtype: str, kept: bool) -> None:
    rng = np.random.default_rng(5)
    rows, scale = random_rows(rng, 2, 300, 12, dtype, 300)
    queries = rng.standard_normal((2, 3, 12)).astype(np.float32)
    found = top(as_chunks(rows, scale, np.arange(300), [100], kept=kept), queries, 7, signs=(1, -1), parts=4)
    left, right = (np.asarray(x, float).reshape(2, -1, 4, 3) for x in (rows, queries))
    products = np.einsum("cnpk,cqpk,cn->qnp", left, right, scale)
    for lane, (ids, parts) in enumerate(zip(found.ids, found.parts, strict=True)):
        np.testing.assert_allclose(parts, products[lane % 3, ids], rtol=1e-6, atol=1e-6 * np.abs(products).max())
    assert top(as_chunks(rows, scale, np.arange(300), [], kept=kept), queries, 7).parts.shape == (3, 7, 0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", [1, 64, 600])
def test_a_light_scan_gives_the_same_bits(dtype: str, k: int) -> None:
    rng = np.random.default_rng(k)
    rows, scale = random_rows(rng, 2, 1500, k, dtype, 900)
    queries, ids = rng.standard_normal((2, 3, k)).astype(np.float32), rng.permutation(1500)
    chunks = as_chunks(rows, scale, ids, [700], kept=False)
    heavy, light = (top(chunks, queries, 20, signs=(1, -1), light=one) for one in (False, True))
    check(light, np.concatenate([brute_force(rows, scale, queries) * sign for sign in (1, -1)]), ids, 20)
    np.testing.assert_array_equal(light.ids, heavy.ids)
    np.testing.assert_array_equal(light.scores, heavy.scores)


def test_a_process_scans_so_much_without_torch_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not Light(100).take(1, 1)  # torch is there, as in most programs
    monkeypatch.delitem(sys.modules, "torch")
    light = Light(100)
    assert [light.take(60, 1), light.take(60, 1), light.take(20, FREE_QUERIES), light.take(20, FREE_QUERIES + 1)] == [
        *(True, False, True, False)
    ]


@pytest.mark.parametrize("q", [1, 3, 9])
@pytest.mark.parametrize("k", [1, 255, 256, 257, 2048, 2**17])
@pytest.mark.parametrize("order", ["C", "F"])
def test_every_product_of_int8_rows_keeps_to_its_bound(
    monkeypatch: pytest.MonkeyPatch, q: int, k: int, order: Any
) -> None:
    rng = np.random.default_rng(k)
    rows, scale = rng.integers(-127, 128, (40, k)).astype(np.int8), rng.uniform(-1, 1, 40).astype(np.float32)
    queries = np.asarray(rng.standard_normal((q, k)) * np.array([1e-6, 1, 1e6] * 3)[:q, None], order=order)
    exact = scale[:, None] * (rows.astype(np.float64) @ queries.T)
    lengths = np.abs(scale) * np.linalg.norm(rows.astype(np.float64), axis=1)
    ways = {
        approximate.by_integers: True,
        approximate.by_bytes: int8.AVAILABLE,
        approximate.by_matrices: amx.AVAILABLE,
        approximate.by_pairs: paired.AVAILABLE and k <= paired.WIDEST,
    }
    for way in (way for way, here in ways.items() if here):
        monkeypatch.setattr(approximate, "_fastest", lambda *_, way=way: way)
        product = product_of(queries, np.linalg.norm(queries, axis=1), rows.dtype, 1)
        assert (np.abs(product.weighted(rows, scale) - exact) <= lengths[:, None] * product.error).all()


@pytest.mark.parametrize("dtype", ["int8", "float32"])
@pytest.mark.parametrize("length", [1e-19, 1e-22, 1e-30])
@pytest.mark.parametrize("q", [1, 20])
def test_products_below_float32s_range_keep_their_order(dtype: Any, length: float, q: int) -> None:
    rng = np.random.default_rng(0)
    train = (rng.standard_normal((5000, 1, 64)) * length).astype(np.float32)
    asked = (rng.standard_normal((q, 1, 64)) * length).astype(np.float32)
    store = rs.write_store(None, {"a": train}, weights={"a": 1e-6}, dtype="float32")
    index = rs.build_index(store, rs.TracIn(), None, dtype=dtype)
    queries = rs.write_store(None, {"a": asked}, dtype="float32")
    chunk = [index.chunk(number) for number in range(len(index.chunks))]
    rows = np.concatenate([one.rows[0] for one in chunk]).astype(np.float64)
    scale = np.concatenate([one.scale[0] for one in chunk]).astype(np.float64)
    expected = asked[:, 0].astype(np.float64) @ (rows * scale[:, None]).T
    found = index.query(queries, k=20)
    np.testing.assert_array_equal(found.ids, np.argsort(-expected, axis=1)[:, :20])
    np.testing.assert_allclose(found.scores, -np.sort(-expected, axis=1)[:, :20], rtol=1e-9)
    np.testing.assert_allclose(
        store.norms("a")[:, 0], np.linalg.norm(train[:, 0].astype(np.float64), axis=1), rtol=1e-6
    )
