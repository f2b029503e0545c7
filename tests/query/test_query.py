"""Index and query against NumPy float64 brute force."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import retrac_scale as rs
from tests import oracle
from tests.conftest import random_images, tiny_unet
from tests.sketching.test_sketching import SCHEDULER

ESTIMATORS = {
    "TracIn": (rs.TracIn(), oracle.tracin),
    "ReTrac": (rs.ReTrac(), oracle.retrac),
    "TracIn matched": (rs.TracIn(pairing="matched"), oracle.tracin_matched),
    "ReTrac matched": (rs.ReTrac(pairing="matched"), oracle.retrac_matched),
    "GradDot": (rs.GradDot(), oracle.tracin),
    "GradCos": (rs.GradCos(), oracle.grad_cos),
}


def pair_of_stores(seed: int, n: int, t: int, dtype: Any = "float32") -> tuple[Any, Any, dict[str, float], Any, Any]:
    rng = np.random.default_rng(seed)
    train = {name: rng.standard_normal((n, t, 12)) for name in ("a", "b")}
    queries = {name: rng.standard_normal((3, t, 12)) for name in ("a", "b")}
    train["a"][n // 2] = train["a"][0]  # duplicates tie
    train["b"][n // 2] = train["b"][0]
    weights = {"a": 0.25, "b": 1.5}
    return (
        rs.write_store(None, train, weights=weights, dtype=dtype),
        rs.write_store(None, queries, dtype=dtype),
        weights,
        train,
        queries,
    )


def brute_force(reference: Any, store: Any, queries: Any, weights: dict[str, float]) -> Any:
    """Float64 scores `[q, n]` of the stored sketches."""
    train, asked = ({c: x.sketches(c).astype(np.float64) for c in weights} for x in (store, queries))
    return reference(train, asked, weights)


def expected_order(scores: Any, ids: Any, k: int) -> Any:
    return np.array([ids[np.lexsort((ids, -row))[:k]] for row in scores])


@given(
    name=st.sampled_from(sorted(ESTIMATORS)),
    seed=st.integers(0, 99),
    n=st.integers(1, 200),
    t=st.integers(1, 3),
    k=st.integers(1, 12),
    side=st.sampled_from(["proponents", "opponents"]),
)
def test_answers_equal_brute_force_with_weights_and_ties(
    name: str, seed: int, n: int, t: int, k: int, side: Any
) -> None:
    estimator, reference = ESTIMATORS[name]
    store, queries, weights, *_ = pair_of_stores(seed, n, t)
    answer = rs.build_index(store, estimator, None, dtype="float32").query(queries, k, side=side)
    scores = brute_force(reference, store, queries, weights)
    assert answer.ids.shape == (3, min(k, n))
    found = np.take_along_axis(scores, answer.ids, 1)
    np.testing.assert_allclose(answer.scores, found, rtol=1e-4, atol=1e-5)
    sign = 1 if side == "proponents" else -1
    best = -np.sort(-sign * scores, axis=1)[:, : min(k, n)]
    np.testing.assert_allclose(sign * found, best, rtol=1e-4, atol=1e-5)
    half, first = (np.argwhere(answer.ids == row) for row in (n // 2, 0))
    for q, place in half:
        if n > 1:  # the duplicate with the smaller id stands just before
            assert [q, place - 1] in first.tolist()


@pytest.mark.parametrize("name", sorted(ESTIMATORS))
def test_scores_and_order_equal_float64_brute_force(name: str) -> None:
    estimator, reference = ESTIMATORS[name]
    store, queries, weights, *_ = pair_of_stores(0, 400, 2)
    index = rs.build_index(store, estimator, None, dtype="float32")
    scores = brute_force(reference, store, queries, weights)
    scores[:, 200] = scores[:, 0]  # a duplicate, which brute force rounds its own way
    answer = index.query(queries, 400)
    np.testing.assert_array_equal(answer.ids, expected_order(scores, np.arange(400), 400))
    np.testing.assert_allclose(answer.scores, -np.sort(-scores, axis=1), atol=3e-6 * np.abs(scores).max())
    np.testing.assert_allclose(index.scores(queries).compute(), scores, atol=3e-6 * np.abs(scores).max())


@pytest.mark.parametrize("name", sorted(ESTIMATORS))
def test_a_bfloat16_store_is_queried_as_what_it_holds(name: str) -> None:
    """Entries of eight bits, which bfloat16 holds exactly, so that the rows as they were given are the oracle."""
    estimator, reference = ESTIMATORS[name]
    rng = np.random.default_rng(0)
    train, asked = (
        {c: np.concatenate([rng.integers(-127, 128, (n, 2, 15)), np.full((n, 2, 1), 128)], 2) / 8.0 for c in ("a", "b")}
        for n in (150, 3)
    )
    weights = {"a": 0.25, "b": -1.5}
    store = rs.write_store(None, train, weights=weights, dtype="bfloat16")
    queries = rs.write_store(None, asked, dtype="bfloat16")
    scores = reference(train, asked, weights)
    answer = rs.build_index(store, estimator, None, dtype="float32").query(queries, 150)
    np.testing.assert_array_equal(answer.ids, expected_order(scores, np.arange(150), 150))
    np.testing.assert_allclose(answer.scores, -np.sort(-scores, axis=1), atol=3e-6 * np.abs(scores).max())
    expected = np.diag(reference(train, train, weights))
    np.testing.assert_allclose(rs.self_influence(store, estimator), expected, rtol=1e-5)


@given(name=st.sampled_from(sorted(ESTIMATORS)), seed=st.integers(0, 99), n=st.integers(1, 150), t=st.integers(1, 3))
def test_int8_scores_are_within_the_documented_bound(name: str, seed: int, n: int, t: int) -> None:
    estimator, _ = ESTIMATORS[name]
    store, queries, weights, *_ = pair_of_stores(seed, n, t, dtype="int8")
    index = rs.build_index(store, estimator, None)
    answer = index.query(queries, n)
    rows = {c: estimator.rows(store, c).astype(np.float64) for c in weights}
    asked = index.query_rows(queries).astype(np.float64)
    exact = sum(weights[c] * asked[i] @ rows[c].T for i, c in enumerate(weights))
    bound = sum(
        weights[c] * np.abs(asked[i]).sum(1)[:, None] * np.abs(rows[c]).max(1)[None] / 254
        for i, c in enumerate(weights)
    )
    error = np.abs(answer.scores - np.take_along_axis(exact, answer.ids, 1))
    assert (error <= 1.01 * np.take_along_axis(bound, answer.ids, 1) + 1e-6).all()


COLUMNS = {
    "label": np.arange(90) % 4,
    "artist": np.array([f"artist {i % 7}" for i in range(90)]),
    "open": np.arange(90) % 3 == 0,
}


def index_with_columns(dtype: Any = "float32") -> tuple[Any, Any, Any]:
    """An index of 90 samples with columns, three queries (samples 0, 40 and 89), and the float64 scores `[q, n]`."""
    rng = np.random.default_rng(1)
    train = {name: rng.standard_normal((90, 2, 12)) for name in ("a", "b")}
    weights = {"a": 0.25, "b": 1.5}
    store = rs.write_store(None, train, weights=weights, dtype="float32", columns=COLUMNS)
    queries = rs.take(store, [0, 40, 89])
    index = rs.build_index(store, rs.ReTrac(), None, dtype=dtype)
    return index, queries, brute_force(oracle.retrac, store, queries, weights)


def test_where_takes_a_mask_ids_or_an_expression() -> None:
    index, queries, scores = index_with_columns()
    chosen = [80, 3, 5]
    answer = index.query(queries, 10, where=chosen)
    assert sorted(answer.ids[0].tolist()) == [3, 5, 80]
    np.testing.assert_array_equal(index.query(queries, 10, where=np.isin(index.ids, chosen)).ids, answer.ids)
    mask = (COLUMNS["label"] == 2) & (COLUMNS["artist"] != "artist 3") | (index.ids > 85)
    answer = index.query(queries, 10, where="label == 2 and artist != 'artist 3' or id > 85")
    np.testing.assert_array_equal(answer.ids, expected_order(np.where(mask, scores, -np.inf), index.ids, 10))
    for where, message in (
        ([90], "names the id 90"),
        ("label == 9", "leaves no sample"),
        (np.zeros(90, bool), "leaves no sample"),
        (np.ones(3, bool), "the index has 90 samples"),
        (np.arange(90) % 2, r"names an id more than once; is it a mask\? Give booleans"),
        ((np.arange(90) % 2).astype(float), r"is it a mask\? Give booleans"),
        ("painter == 1", "the columns are id, artist, label, open"),
        ("label + 1", "must say yes or no"),
    ):
        with pytest.raises(ValueError, match=message):
            index.query(queries, where=where)


def test_both_sides_and_the_query_itself_left_out() -> None:
    index, queries, scores = index_with_columns()
    assert index.query(queries, 1).ids.ravel().tolist() == [0, 40, 89]
    scores[np.arange(3), [0, 40, 89]] = np.nan
    answer = index.query(queries, 6, side="both", exclude_self=True)
    np.testing.assert_array_equal(answer.ids[:, :6], expected_order(np.nan_to_num(scores, nan=-9), index.ids, 6))
    np.testing.assert_array_equal(answer.ids[:, 6:], expected_order(-np.nan_to_num(scores, nan=9), index.ids, 6))
    np.testing.assert_allclose(answer.scores, np.take_along_axis(scores, answer.ids, 1), atol=1e-6)
    frame = answer.to_frame()
    assert frame["rank"].tolist() == [*range(1, 7)] * 6
    assert frame["side"].tolist() == (["proponents"] * 6 + ["opponents"] * 6) * 3
    assert index.query(queries, 90, exclude_self=True).ids.shape == (3, 89)


@pytest.mark.parametrize("reduce", ["sum", "mean", "max"])
@pytest.mark.parametrize("side", ["proponents", "opponents"])
def test_groups_equal_brute_force(reduce: Any, side: Any) -> None:
    index, queries, scores = index_with_columns()
    sign = 1 if side == "proponents" else -1
    mask, values = np.tile(COLUMNS["open"], (3, 1)), sign * scores
    mask[np.arange(3), [0, 40, 89]] = False
    artists = np.unique(COLUMNS["artist"])
    function = getattr(np, reduce)
    expected = np.array(
        [[function(values[q, mask[q] & (COLUMNS["artist"] == artist)]) for artist in artists] for q in range(3)]
    )
    options: dict[str, Any] = {"side": side, "reduce": reduce, "where": "open", "exclude_self": True}
    answer = index.query(queries, 5, group_by="artist", **options)
    np.testing.assert_array_equal(answer.ids, expected_order(expected, artists, 5))
    np.testing.assert_allclose(sign * answer.scores, -np.sort(-expected, axis=1)[:, :5], atol=1e-6)
    np.testing.assert_array_equal(index.query(queries, 5, group_by=COLUMNS["artist"], **options).ids, answer.ids)
    known = ["share", "share_error"] if reduce == "max" else ["error", "share", "share_error"]
    assert list(answer.to_frame().columns) == ["id", "score", "rank", "query", "side", *known]


@pytest.mark.parametrize("reduce", ["sum", "mean"])
def test_errors_of_groups_and_of_their_shares_are_those_of_a_bootstrap_over_members(reduce: Any) -> None:
    index, queries, scores = index_with_columns()
    answer = index.query(queries, 5, group_by="artist", reduce=reduce)
    assert answer.errors is not None
    assert answer.shares is not None
    assert answer.share_errors is not None
    rng, artists, raised = np.random.default_rng(0), COLUMNS["artist"], np.maximum(scores, 0)
    count = len(np.unique(artists))
    every: Any = index.query(queries, count, group_by="artist")
    np.testing.assert_allclose(every.shares.sum(1), 1)
    for place, artist in enumerate(answer.ids[0]):
        own = scores[0][artists == artist]
        drawn = getattr(own[rng.integers(0, len(own), (20_000, len(own)))], reduce)(1)
        assert answer.errors[0, place] == pytest.approx(drawn.std(), rel=0.03)
        share = raised[0][artists == artist].sum() / raised[0].sum()
        assert answer.shares[0, place] == pytest.approx(share, rel=1e-4)
        rows = rng.integers(0, len(artists), (20_000, len(artists)))
        shares = (raised[0] * (artists == artist))[rows].sum(1) / raised[0][rows].sum(1)
        assert answer.share_errors[0, place] == pytest.approx(shares.std(), rel=0.1)


def test_groups_without_samples_are_left_out_and_wrong_groups_named() -> None:
    index, queries, _ = index_with_columns()
    assert index.query(queries, 9, group_by="artist", where="artist == 'artist 2'").ids.tolist() == [["artist 2"]] * 3
    with pytest.raises(ValueError, match="no column of the index; it has artist, label, open"):
        index.query(queries, group_by="painter")
    with pytest.raises(ValueError, match="one label for each of 90 samples"):
        index.query(queries, group_by=[1, 2])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 0}, "k must be an integer of 1 or more"),
        ({"side": "friends"}, "side must be one of"),
        ({"reduce": "median"}, "reduce must be one of"),
        ({"rerank": 5}, "train=rs.Samples"),
    ],
)
def test_wrong_questions_are_refused(options: dict[str, Any], message: str) -> None:
    index, queries, _ = index_with_columns()
    with pytest.raises(ValueError, match=message):
        index.query(queries, **options)
    with pytest.raises(ValueError, match="must be a SketchStore or rs"):
        index.query(np.zeros((2, 3)))


def test_explanations_add_up_to_the_score() -> None:
    for pairing in ("cross", "matched"):
        store, queries, *_ = pair_of_stores(0, 60, 3)
        index = rs.build_index(store, rs.ReTrac(pairing=pairing), None, dtype="float32")
        answer = index.query(queries, 1)
        explanation = index.explain(rs.take(queries, [2]), answer.ids[2, 0])
        assert explanation.contributions.shape == (2, 3, 3)
        assert explanation.score == pytest.approx(answer.scores[2, 0], rel=1e-6)
        assert explanation.contributions.sum() == pytest.approx(explanation.score, rel=1e-5)
        left = store.sketches("a")[answer.ids[2, 0], 1] / store.norms("a")[answer.ids[2, 0], 1]
        right = queries.sketches("a")[2, 1] / queries.norms("a")[2, 1]
        pairs = 1 if pairing == "matched" else 9
        assert explanation.contributions[0, 1, 1] == pytest.approx(0.25 * left @ right / pairs, rel=1e-4)
        assert np.asarray(explanation.figure().axes[0].images[0].get_array()).shape == (2, 3)
    with pytest.raises(ValueError, match="one query at a time"):
        index.explain(queries, 0)
    with pytest.raises(ValueError, match="no sample 60"):
        index.explain(rs.take(queries, [0]), 60)


@pytest.mark.parametrize(
    "estimator",
    [
        rs.ReTrac(),
        rs.ReTrac(pairing="matched"),
        *(pytest.param(one, marks=pytest.mark.slow) for one in (rs.TracIn(), rs.GradCos())),
    ],
)
def test_rerank_puts_candidates_in_the_order_of_exact_scores(estimator: Any) -> None:
    images, generated = random_images(12, 3), random_images(3, 13)
    states = {name: tiny_unet(number).state_dict() for number, name in enumerate(["early", "late"])}
    task = rs.DiffusionTask(tiny_unet(), SCHEDULER)
    common: dict[str, Any] = {"checkpoints": states, "progress": False}
    steps = rs.Explicit([20, 70], draws=2)
    store = rs.sketch(task, images, None, timesteps=steps, projection=rs.CountSketch(16), **common)
    index = rs.build_index(store, estimator, None)
    queries, train = (rs.Samples(x, task, states, steps) for x in (generated, images))
    answer = index.query(queries, 5, rerank=12, train=train, side="both")

    full = rs.sketch(task, images, None, timesteps=steps, projection=rs.Identity(), dtype="float32", **common)
    asked = rs.sketch(task, generated, None, timesteps=steps, like=full, dtype="float32", **common)
    exact = rs.build_index(full, estimator, None, dtype="float32").query(asked, 5, side="both")
    np.testing.assert_array_equal(answer.ids, exact.ids)
    np.testing.assert_allclose(answer.scores, exact.scores, rtol=2e-4)
    by_sketch = index.query(queries, 12)
    assert answer.sketch_rank is not None
    for q in range(3):
        ranks = [by_sketch.ids[q].tolist().index(sample) + 1 for sample in answer.ids[q, :5]]
        assert answer.sketch_rank[q, :5].tolist() == ranks
    assert (answer.sketch_rank[:, :5] != np.arange(1, 6)).any()
    assert "sketch_rank" in answer.to_frame().columns
    with pytest.raises(ValueError, match=r"as rs\.Samples"):
        index.query(queries.sketch(like=store), rerank=12, train=train)
    other = rs.Samples(images, task, {"early": states["late"], "late": states["late"]}, steps)
    with pytest.raises(ValueError, match="has other weights"):
        index.query(queries, rerank=12, train=other)
    fewer = rs.Samples(images, task, states, rs.Explicit([20]))
    with pytest.raises(ValueError, match="use the same"):
        index.query(queries, rerank=12, train=fewer)


@pytest.mark.parametrize("squared", [False, True])
@pytest.mark.parametrize("t", [2, 5])
def test_errors_are_those_of_sums_of_measurements_and_tell_which_neighbours_stand_apart(t: int, squared: bool) -> None:
    rng = np.random.default_rng(0)
    rows, asked = (rng.standard_normal((n, 1, 8)) + 0.1 * rng.standard_normal((n, t, 8)) for n in (40, 3))
    store = rs.write_store(None, {"a": rows, "b": rows[::-1]}, weights=[0.5, 2.0], timesteps=range(t), dtype="float32")
    queries = rs.write_store(None, {"a": asked, "b": asked}, timesteps=range(t), dtype="float32")
    estimator = rs.TRAK(0.5, pairing="matched", squared=squared)
    index = rs.build_index(store, estimator, None, dtype="float32")
    answer = index.query(queries, 40)
    assert answer.errors is not None
    assert answer.resolved is not None
    for q in range(3):
        explained = [index.explain(rs.take(queries, [q]), i) for i in answer.ids[q]]
        parts = np.array([one.contributions.sum((0, 2)) for one in explained])  # [n, t]
        parts *= 2 * parts.sum(1, keepdims=True) if squared else 1
        np.testing.assert_allclose(answer.errors[q], np.sqrt(t) * parts.std(1, ddof=1), rtol=1e-6)
        gaps, between = -np.diff(answer.scores[q]), t * np.diff(parts, axis=0).var(1, ddof=1)
        np.testing.assert_array_equal(answer.resolved[q, :-1], gaps > 2 * np.sqrt((between + between.mean()) / 2))
    assert answer.resolved[:, :-1].any()
    assert not answer.resolved.all()


def test_errors_are_unbiased_for_repeated_measurements() -> None:
    """Products of vectors with independent noise, of which the variance is known."""
    rng = np.random.default_rng(1)
    image, other = rng.standard_normal((2, 16))
    images, others = (x + rng.standard_normal((1000, 6, 16)) for x in (image, other))
    sides = (rs.write_store(None, {"c": x}, timesteps=range(6), dtype="float32") for x in (images, others[:20]))
    store, queries = sides
    answer = rs.build_index(store, rs.TracIn("matched"), None, dtype="float32").query(queries, 1000)
    assert answer.errors is not None
    variance = 6 * (image @ image + other @ other + 16)
    assert np.mean(np.square(answer.errors)) == pytest.approx(variance, rel=0.1)


def test_rows_that_are_means_and_single_measurements_tell_no_errors() -> None:
    store, queries, *_ = pair_of_stores(0, 20, 3)
    assert rs.build_index(store, rs.ReTrac(), None).query(queries, 3).errors is None
    once = rs.write_store(None, {"c": np.eye(4)[:, None]})
    answer = rs.build_index(once, rs.ReTrac("matched"), None).query(once, 3)
    assert answer.errors is None
    assert answer.resolved is None


@pytest.mark.parametrize("seed", [0, 1])
def test_scores_of_a_diffusion_model_are_those_of_the_paper(seed: int) -> None:
    """50 samples, two checkpoints, no projection: TracIn and ReTrac from the full gradients of arXiv 2401.09031."""
    images, generated = random_images(50, seed), random_images(2, seed + 10)
    states = {name: tiny_unet(seed + number).state_dict() for number, name in enumerate(["early", "late"])}
    task = rs.DiffusionTask(tiny_unet(), SCHEDULER)
    common: dict[str, Any] = {"checkpoints": states, "dtype": "float32", "progress": False}
    store = rs.sketch(task, images, None, timesteps=rs.Explicit([20], noise="own"), projection=rs.Identity(), **common)
    plan = rs.EvenlySpaced(3, draws=2, noise="own")
    queries = rs.sketch(task, generated, None, timesteps=plan, like=store, **common)

    def gradients(samples: Any, timesteps: list[int], draws: int, noise: int) -> Any:
        def one(state: Any, i: int, t: int) -> Any:
            return oracle.pair_gradient(task.model, state, SCHEDULER, samples[i], i, t, draws=draws, seed=noise)

        return {
            name: np.array([[one(state, i, t) for t in timesteps] for i in range(len(samples))])
            for name, state in states.items()
        }

    train, asked = gradients(images, [20], 1, 0), gradients(generated, [1, 50, 99], 2, 1)
    for estimator, reference in ((rs.TracIn(), oracle.tracin), (rs.ReTrac(), oracle.retrac)):
        expected = reference(train, asked, {"early": 1, "late": 1})
        answer = rs.build_index(store, estimator, None, dtype="float32").query(queries, 50)
        scale = np.abs(expected).max()
        np.testing.assert_allclose(answer.scores, np.take_along_axis(expected, answer.ids, 1), atol=1e-4 * scale)


def test_query_i_shares_no_noise_with_training_sample_i() -> None:
    """One image on both sides under default ids and own noise: with one seed its gradients would be the same."""
    images, task = random_images(4, 0), rs.DiffusionTask(tiny_unet(), SCHEDULER)
    options: dict[str, Any] = {"checkpoints": {"c": tiny_unet().state_dict()}, "dtype": "float32", "progress": False}

    def sketched(plan: Any, like: Any = None) -> Any:
        projection = None if like else rs.CountSketch(64)
        made = rs.sketch(task, images, None, timesteps=plan, like=like, projection=projection, batch_size=8, **options)
        return made, made.sketches("c")

    plans: list[tuple[Any, Any]] = [
        (partial(rs.EvenlySpaced, noise="own"), 3),
        (partial(rs.Explicit, noise="own"), [20, 70]),
    ]
    for plan, unset in plans:
        store, rows = sketched(plan(unset))
        queries, asked = sketched(plan(unset), store)
        assert (rows != asked).any(axis=2).all()
        assert "seed" not in store.fingerprint["timesteps"]  # as before plans had one
        assert queries.fingerprint["timesteps"]["seed"] == 1
        np.testing.assert_array_equal(sketched(plan(unset, seed=1))[1], asked)
        np.testing.assert_array_equal(sketched(plan(unset, seed=0), store)[1], rows)
        again = rs.Samples(images, task, options["checkpoints"], plan(unset)).sketch(like=store)
        assert again.fingerprint["timesteps"] == queries.fingerprint["timesteps"]


def test_unrelated_queries_do_not_rank_the_training_sample_of_their_id_first() -> None:
    images, others = random_images(40, 0), random_images(40, 1)
    task, states = rs.DiffusionTask(tiny_unet(), SCHEDULER), {"c": tiny_unet().state_dict()}
    common: dict[str, Any] = {"checkpoints": states, "dtype": "float32", "progress": False}
    own = partial(rs.EvenlySpaced, 4, noise="own")
    store = rs.sketch(task, images, None, timesteps=own(), projection=rs.CountSketch(1024), **common)
    index = rs.build_index(store, rs.ReTrac(), None, dtype="float32")

    def excess(seed: int | None) -> float:
        """How far the scores of sample i for query i lie above those of the others, in standard errors."""
        asked = rs.sketch(task, others, None, timesteps=own(seed=seed), like=store, **common)
        scores = index.scores(asked).compute()
        centred = scores - scores.mean(0) - scores.mean(1, keepdims=True) + scores.mean()
        return float(np.diag(centred).mean() / centred.std() * len(scores) ** 0.5)

    assert excess(0) > 5
    assert abs(excess(None)) < 3


def test_self_influence_is_the_score_of_a_sample_with_itself() -> None:
    store, _, weights, _, _ = pair_of_stores(2, 130, 2)
    sketches = {c: store.sketches(c).astype(np.float64) for c in weights}
    for estimator, reference in ESTIMATORS.values():
        expected = np.diag(reference(sketches, sketches, weights))
        np.testing.assert_allclose(rs.self_influence(store, estimator), expected, rtol=1e-4, atol=1e-5)
    other = rs.write_store(None, {c: x[:, :1] for c, x in sketches.items()}, dtype="float32")
    expected = np.diag(oracle.retrac(sketches, {c: x[:, :1] for c, x in sketches.items()}, weights))
    np.testing.assert_allclose(rs.self_influence(store, rs.ReTrac(), queries=other), expected, rtol=1e-4, atol=1e-5)


def test_self_influence_of_deleted_samples_is_nan() -> None:
    store, _, weights, *_ = pair_of_stores(2, 130, 2)
    expected = np.diag(brute_force(oracle.retrac, store, store, weights)).copy()
    queries = rs.write_store(None, {c: store.sketches(c) for c in weights}, dtype="float32")
    store.delete([3, 129])
    expected[[3, 129]] = np.nan
    np.testing.assert_allclose(rs.self_influence(store, rs.ReTrac()), expected, rtol=1e-4, atol=1e-5)
    queries.delete([64])
    expected[64] = np.nan
    found = rs.self_influence(store, rs.ReTrac(), queries=queries)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    assert not set(np.argsort(-found)[:127].tolist()) & {3, 64, 129}


def test_a_gradient_of_norm_zero_scores_zero_under_retrac() -> None:
    store = rs.write_store(None, {"c": np.zeros((2, 1, 4))})
    queries = rs.write_store(None, {"c": np.ones((1, 1, 4))})
    assert rs.build_index(store, rs.ReTrac(), None).query(queries).scores.tolist() == [[0, 0]]


def test_queries_of_another_projection_checkpoint_or_grid_are_refused(tmp_path: Path) -> None:
    images = random_images(2)
    task = rs.DiffusionTask(tiny_unet(), SCHEDULER)
    common: dict[str, Any] = {"timesteps": rs.Explicit([5]), "progress": False}
    one, two = ({"c": tiny_unet(seed).state_dict()} for seed in (0, 1))
    store = rs.sketch(task, images, None, checkpoints=one, projection=rs.CountSketch(32), **common)
    index = rs.build_index(store, rs.ReTrac(), None)
    other = rs.sketch(task, images, None, checkpoints=one, projection=rs.CountSketch(32, seed=1), **common)
    with pytest.raises(ValueError, match=r"projection\.seed is 0 there and 1 here; sketch the queries with like=store"):
        index.query(other)
    with pytest.raises(ValueError, match=r"checkpoints\.c is"):
        rs.sketch(task, images, tmp_path / "s", checkpoints=two, like=store, **common)
    assert not (tmp_path / "s").exists()
    matched = rs.build_index(store, rs.ReTrac(pairing="matched"), None)
    shifted = rs.sketch(task, images, None, checkpoints=one, like=store, timesteps=rs.Explicit([6]), progress=False)
    with pytest.raises(ValueError, match="matched pairing needs the index's timesteps"):
        matched.query(shifted)


def test_answers_become_tables_and_json() -> None:
    store, queries, *_ = pair_of_stores(3, 20, 1)
    answer = rs.build_index(store, rs.TracIn(), None).query(queries, 2)
    frame = answer.to_frame()
    assert list(frame.columns) == ["id", "score", "rank", "query", "side"]
    store, queries, *_ = pair_of_stores(3, 20, 2)
    matched = rs.build_index(store, rs.TracIn("matched"), None).query(queries, 2).to_frame()
    assert list(matched.columns) == ["id", "score", "rank", "query", "side", "error", "resolved"]
    assert frame["id"].tolist() == answer.ids.ravel().tolist()
    parsed = json.loads(answer.to_json())
    assert parsed["estimator"]["kind"] == "TracIn"
    assert parsed["results"][1]["scores"] == answer.scores[1].tolist()
    table = answer.to_arrow()
    assert table.column("score").to_pylist() == answer.scores.ravel().tolist()
    assert json.loads(table.schema.metadata[b"estimator"])["kind"] == "TracIn"


def test_lists_end_at_zero_where_they_are_shown() -> None:
    scores = np.array([[0.5, 0.2, -0.3, -0.1], [0.5, -0.2, 0.3, 0.0]])
    ids = np.array([["a/1.png", "a/2.png", "a/3.png", "a/4.png"]] * 2)
    both = rs.TopK(ids, scores, np.array(["p", "q"]), "both", errors=np.abs(scores) / 2, resolved=scores > 0.3)
    assert both.listed.tolist() == [[True, True, True, True], [True, False, False, False]]
    assert both.to_frame()[["query", "side", "id"]].to_numpy().tolist() == [
        ["p", "proponents", "a/1.png"],
        ["p", "proponents", "a/2.png"],
        ["p", "opponents", "a/3.png"],
        ["p", "opponents", "a/4.png"],
        ["q", "proponents", "a/1.png"],
    ]
    assert [len(one["scores"]) for one in json.loads(both.to_json())["results"]] == [4, 1]
    told = str(both)
    assert told.count("no opponents: no score is negative") == 1
    assert [line.split() for line in told.splitlines()[2:4]] == [
        ["1", "a/1.png", "0.5", "±", "0.25"],
        ["2", "a/2.png", "0.2", "±", "0.1", "~"],
    ]
    assert told.count("order is not resolved") == 1
    frame = repr(rs.TopK(ids, scores, np.array(["a" * 40] * 2), "both", errors=scores, resolved=scores > 0).to_frame())
    assert "a/1.png    0.5" in frame  # however wide the rest


@pytest.mark.parametrize(
    ("ids", "fraction", "share"), [([[1, 2], [1, 3]], 0.75, 1.0), ([[1, 2], [3, 4]], 1.0, 0.5), ([[5]] * 4, 0.25, 1.0)]
)
def test_specificity_on_hand_computed_lists(ids: list[list[int]], fraction: float, share: float) -> None:
    assert rs.evaluate.unique_fraction(np.array(ids)) == fraction
    assert rs.evaluate.specificity.largest_share(np.array(ids)) == share


def test_an_expression_that_calls_something_is_refused_and_not_run(tmp_path: Path) -> None:
    index, queries, _ = index_with_columns()
    target = tmp_path / "written"
    for expression in (f"id.to_pickle({str(target)!r}) == 1", "id.values == 1", "(lambda: 1) == 1", "id[0] == 1"):
        with pytest.raises(ValueError, match="use column names, values, comparisons"):
            index.query(queries, where=expression)
    assert not target.exists()


def test_no_answer_is_cut_short_by_what_another_query_leaves_out() -> None:
    rng = np.random.default_rng(0)
    index = rs.build_index(rs.write_store(None, {"a": rng.standard_normal((4, 1, 8))}), rs.TracIn(), None)
    queries = rs.write_store(None, {"a": rng.standard_normal((2, 1, 8))}, ids=[0, 100])
    with pytest.raises(ValueError, match=r"k = 4 is more than every query has: .* ask for at most 3"):
        index.query(queries, 4, exclude_self=True)
    assert index.query(queries, 3, exclude_self=True).ids.shape == (2, 3)


def test_answers_do_not_depend_on_threads() -> None:
    store, queries, *_ = pair_of_stores(4, 700, 2)
    index = rs.build_index(store, rs.ReTrac(), None)
    options: list[dict[str, Any]] = [{"side": "both"}, {"where": "id > 80"}, {"where": [3, 650]}]
    one = [index.query(queries, 20, **chosen) for chosen in options]
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        several = [index.query(queries, 20, **chosen) for chosen in options]
    finally:
        torch.set_num_threads(before)
    for left, right in zip(one, several, strict=True):
        np.testing.assert_array_equal(left.ids, right.ids)
        np.testing.assert_array_equal(left.scores, right.scores)
