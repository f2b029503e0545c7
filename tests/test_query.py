"""Index and query against NumPy float64 brute force."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import retrac_scale as rs
from tests import oracle
from tests.conftest import random_images, tiny_unet
from tests.test_sketching import SCHEDULER

ESTIMATORS = {
    "TracIn": (rs.TracIn(), oracle.tracin),
    "ReTrac": (rs.ReTrac(), oracle.retrac),
    "ReTrac matched": (rs.ReTrac(pairing="matched"), oracle.retrac_matched),
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
    store, queries, weights, train, asked = pair_of_stores(seed, n, t)
    answer = rs.build_index(store, estimator, None, dtype="float32").query(queries, k, side=side)
    scores = reference(
        {c: store.sketches(c).astype(np.float64) for c in train},
        {c: queries.sketches(c).astype(np.float64) for c in asked},
        weights,
    )
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


def test_int8_scores_are_within_the_rounding_bound() -> None:
    store, queries, weights, _, _ = pair_of_stores(0, 300, 2, dtype="int8")
    index = rs.build_index(store, rs.ReTrac(), None)
    answer = index.query(queries, 300)
    rows = {c: rs.ReTrac().rows(store, c).astype(np.float64) for c in weights}
    asked = index.query_rows(queries).astype(np.float64)
    exact = sum(weights[c] * asked[i] @ rows[c].T for i, c in enumerate(weights))
    bound = sum(
        weights[c] * np.abs(asked[i]).sum(1)[:, None] * np.abs(rows[c]).max(1)[None] / 254
        for i, c in enumerate(weights)
    )
    error = np.abs(answer.scores - np.take_along_axis(exact, answer.ids, 1))
    assert (error <= 1.01 * np.take_along_axis(bound, answer.ids, 1) + 1e-6).all()


def test_where_takes_a_mask_or_ids() -> None:
    store, queries, *_ = pair_of_stores(1, 90, 1)
    index = rs.build_index(store, rs.TracIn(), None, dtype="float32")
    chosen = [80, 3, 5]
    answer = index.query(queries, 10, where=chosen)
    assert sorted(answer.ids[0].tolist()) == [3, 5, 80]
    np.testing.assert_array_equal(index.query(queries, 10, where=np.isin(index.ids, chosen)).ids, answer.ids)
    with pytest.raises(ValueError, match="names the id 90"):
        index.query(queries, where=[90])


@pytest.mark.parametrize("seed", [0, 1])
def test_scores_of_a_diffusion_model_are_those_of_the_paper(seed: int) -> None:
    """50 samples, two checkpoints, no projection: TracIn and ReTrac from the full gradients of arXiv 2401.09031."""
    images, generated = random_images(50, seed), random_images(2, seed + 10)
    states = {name: tiny_unet(seed + number).state_dict() for number, name in enumerate(["early", "late"])}
    task = rs.DiffusionTask(tiny_unet(), SCHEDULER)
    common: dict[str, Any] = {"checkpoints": states, "dtype": "float32", "progress": False}
    store = rs.sketch(task, images, None, timesteps=rs.Explicit([20]), projection=rs.Identity(), **common)
    queries = rs.sketch(task, generated, None, timesteps=rs.EvenlySpaced(3, draws=2), like=store, **common)

    def gradients(samples: Any, timesteps: list[int], draws: int) -> Any:
        return {
            name: np.array(
                [
                    [oracle.pair_gradient(task.model, state, SCHEDULER, x, i, t, draws=draws) for t in timesteps]
                    for i, x in enumerate(samples)
                ]
            )
            for name, state in states.items()
        }

    train, asked = gradients(images, [20], 1), gradients(generated, [1, 50, 99], 2)
    for estimator, reference in ((rs.TracIn(), oracle.tracin), (rs.ReTrac(), oracle.retrac)):
        expected = reference(train, asked, {"early": 1, "late": 1})
        answer = rs.build_index(store, estimator, None, dtype="float32").query(queries, 50)
        scale = np.abs(expected).max()
        np.testing.assert_allclose(answer.scores, np.take_along_axis(expected, answer.ids, 1), atol=1e-4 * scale)


def test_self_influence_is_the_score_of_a_sample_with_itself() -> None:
    store, _, weights, _, _ = pair_of_stores(2, 130, 2)
    sketches = {c: store.sketches(c).astype(np.float64) for c in weights}
    for estimator, reference in ESTIMATORS.values():
        expected = np.diag(reference(sketches, sketches, weights))
        np.testing.assert_allclose(rs.self_influence(store, estimator), expected, rtol=1e-4, atol=1e-5)
    other = rs.write_store(None, {c: x[:, :1] for c, x in sketches.items()}, dtype="float32")
    expected = np.diag(oracle.retrac(sketches, {c: x[:, :1] for c, x in sketches.items()}, weights))
    np.testing.assert_allclose(rs.self_influence(store, rs.ReTrac(), queries=other), expected, rtol=1e-4, atol=1e-5)


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


def test_an_index_is_kept_reopened_and_never_mistaken(tmp_path: Path) -> None:
    sketches = {"c": np.random.default_rng(0).standard_normal((80, 1, 8))}
    store = rs.write_store(tmp_path / "s", sketches)
    built = rs.build_index(store, rs.TracIn(), tmp_path / "i")
    written = (tmp_path / "i" / "row" / "c" / "0" / "0" / "0").stat().st_mtime_ns
    rs.build_index(store, rs.TracIn(), tmp_path / "i")
    assert (tmp_path / "i" / "row" / "c" / "0" / "0" / "0").stat().st_mtime_ns == written
    np.testing.assert_array_equal(rs.open_index(tmp_path / "i").query(store).ids, built.query(store).ids)
    with pytest.raises(ValueError, match=r"a different index: estimator\.kind is 'TracIn' there and 'ReTrac' here"):
        rs.build_index(store, rs.ReTrac(), tmp_path / "i")
    with pytest.raises(ValueError, match="no index"):
        rs.open_index(tmp_path / "s")
    with pytest.raises(ValueError, match="is no index"):
        rs.build_index(store, rs.TracIn(), tmp_path / "s")
    built.root.attrs["retrac_scale"] = {**built.meta, "complete": False}
    with pytest.raises(ValueError, match="was not finished"):
        rs.open_index(tmp_path / "i")


def test_answers_become_tables_and_json() -> None:
    store, queries, *_ = pair_of_stores(3, 20, 1)
    answer = rs.build_index(store, rs.TracIn(), None).query(queries, 2)
    frame = answer.to_frame()
    assert list(frame.columns) == ["query", "rank", "id", "score", "error", "resolved", "side"]
    assert frame["id"].tolist() == answer.ids.ravel().tolist()
    parsed = json.loads(answer.to_json())
    assert parsed["estimator"]["kind"] == "TracIn"
    assert parsed["results"][1]["scores"] == answer.scores[1].tolist()


@pytest.mark.parametrize(
    ("ids", "fraction", "share"), [([[1, 2], [1, 3]], 0.75, 1.0), ([[1, 2], [3, 4]], 1.0, 0.5), ([[5]] * 4, 0.25, 1.0)]
)
def test_specificity_on_hand_computed_lists(ids: list[list[int]], fraction: float, share: float) -> None:
    assert rs.evaluate.unique_fraction(np.array(ids)) == fraction
    assert rs.evaluate.specificity.largest_share(np.array(ids)) == share
