"""Indexes, queries, reranking and self-influence of stores that have grown, against NumPy float64 brute force."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from distributed import Client

import retrac_scale as rs
from retrac_scale.query.source import for_workers, opened
from tests import oracle
from tests.conftest import Labelled, random_images, tiny_unet
from tests.query.test_query import ESTIMATORS
from tests.sketching.test_sketching import SCHEDULER

IMAGES, GENERATED = random_images(7, 3), random_images(2, 13)
STATES = {name: tiny_unet(seed).state_dict() for seed, name in enumerate(["early", "late"])}
TASK = rs.DiffusionTask(tiny_unet(), SCHEDULER)
PLANS = [rs.Explicit([20, 70], draws=2), rs.Explicit([50])]


def grow(out: Any, n: int, plan: Any, **options: Any) -> rs.SketchStore:
    """Sketch or grow the store of the first n images."""
    arguments = {"projection": rs.CountSketch(16), "checkpoints": STATES, "batch_size": 8, "grow": True, **options}
    return rs.sketch(TASK, Labelled(IMAGES[:n]), out, timesteps=plan, progress=False, **arguments)


FIRST: dict[str, Any] = {"n": 4, "plan": PLANS[0], "names": ["early"]}
GROWTHS: dict[str, list[dict[str, Any]]] = {
    "samples": [{"n": 7}],
    "checkpoints": [{"names": ["early", "late"]}],
    "timesteps": [{"plan": PLANS[1]}],
    "all": [{"n": 7}, {"n": 7, "names": ["early", "late"]}, {"n": 7, "names": ["early", "late"], "plan": PLANS[1]}],
}


def grown(out: Path, steps: list[dict[str, Any]]) -> rs.SketchStore:
    """A store of unprojected gradients that has grown so."""
    for number, step in enumerate([{}, *steps]):
        how = {**FIRST, **step}
        checkpoints = {name: STATES[name] for name in how["names"]}
        options: dict[str, Any] = {"projection": rs.Identity(), "dtype": "float32", "grow": number > 0}
        store = grow(out, how["n"], how["plan"], checkpoints=checkpoints, **options)
    return store


def grown_by_timesteps(out: Path) -> rs.SketchStore:
    """Seven images at three timesteps, two of them with two noise draws."""
    grow(out, 7, PLANS[0], grow=False)
    return grow(out, 7, PLANS[1])


@functools.cache
def train_gradients() -> dict[str, Any]:
    """Those of the images at the timesteps of both plans, `{c: [7, 3, P]}`."""
    return gradients(IMAGES, PLANS)


def gradients(samples: Any, plans: Any) -> dict[str, Any]:
    """Full gradients by plain autograd, float64 `{c: [n, t, P]}`."""

    def row(state: Any, image: Any) -> Any:
        return [
            oracle.pair_gradient(TASK.model, state, SCHEDULER, image, None, t, draws=plan.draws, seed=plan.seed or 0)
            for plan in plans
            for t in plan.timesteps
        ]

    return {name: np.array([row(state, image) for image in samples]) for name, state in STATES.items()}


@pytest.mark.parametrize("growth", GROWTHS)
def test_queries_of_a_grown_store_equal_brute_force(tmp_path: Path, growth: str) -> None:
    store = grown(tmp_path / "s", GROWTHS[growth])
    n, t, _ = store.shape
    train = {name: train_gradients()[name][:n, :t] for name in store.checkpoints}
    store.delete([2])
    alive = np.flatnonzero(np.arange(n) != 2)
    kept = {name: x[alive] for name, x in train.items()}
    weights = dict.fromkeys(train, 1.0)
    queries = rs.take(store, [3, 0])
    asked = {name: x[[3, 0]] for name, x in train.items()}
    for estimator, reference in ESTIMATORS.values():
        expected = reference(kept, asked, weights)
        tolerance = 1e-4 * np.abs(expected).max()
        answer = rs.build_index(store, estimator, None, dtype="float32").query(queries, n, side="both")
        best = -np.sort(-expected, axis=1)
        np.testing.assert_allclose(answer.scores, np.hstack([best, best[:, ::-1]]), atol=tolerance)
        found = np.searchsorted(alive, answer.ids)
        np.testing.assert_allclose(answer.scores, np.take_along_axis(expected, found, 1), atol=tolerance)
        diagonal = np.diag(reference(train, train, weights)).copy()
        diagonal[2] = np.nan
        np.testing.assert_allclose(rs.self_influence(store, estimator), diagonal, rtol=1e-3)


@pytest.mark.slow
def test_rerank_recomputes_the_pairs_that_a_store_grew_by(tmp_path: Path) -> None:
    store = grown_by_timesteps(tmp_path / "s")
    asked = rs.Explicit([30, 60])
    queries = rs.Samples(GENERATED, TASK, STATES, asked)
    expected = oracle.retrac(train_gradients(), gradients(GENERATED, [asked]), {"early": 1, "late": 1})
    index = rs.build_index(store, rs.ReTrac(), None)
    for plans in (PLANS, PLANS[::-1], None):
        answer = index.query(queries, 7, rerank=7, train=rs.Samples(IMAGES, TASK, STATES, plans))
        np.testing.assert_array_equal(answer.ids, np.argsort(-expected, axis=1))
        np.testing.assert_allclose(answer.scores, -np.sort(-expected, axis=1), atol=1e-4 * np.abs(expected).max())
    matched = rs.build_index(store, rs.ReTrac(pairing="matched"), None)
    expected = oracle.retrac_matched(train_gradients(), gradients(GENERATED, PLANS), {"early": 1, "late": 1})
    for plans in (PLANS, None):  # those of the store, in its order
        queries = rs.Samples(GENERATED, TASK, STATES, plans)
        answer = matched.query(queries, 7, rerank=7, train=rs.Samples(IMAGES, TASK, STATES, PLANS[::-1]))
        np.testing.assert_allclose(answer.scores, -np.sort(-expected, axis=1), atol=1e-4 * np.abs(expected).max())


def test_rerank_refuses_pairs_that_are_not_the_stores(tmp_path: Path) -> None:
    index = rs.build_index(grown_by_timesteps(tmp_path / "s"), rs.ReTrac(), None)
    queries = rs.Samples(GENERATED, TASK, STATES, PLANS[1])
    absolute = rs.DiffusionTask(tiny_unet(), SCHEDULER, measure="l1")
    for train, message in (
        (rs.Samples(IMAGES, TASK, STATES, PLANS[0]), r"timesteps are \[.*20, 70.*50.*\] there and \[.*\] here"),
        (rs.Samples(IMAGES, TASK, STATES, [*PLANS, rs.Explicit([9])]), "timesteps are"),
        (rs.Samples(IMAGES, absolute, STATES, PLANS), "measure is 'mse' there and 'l1' here"),
    ):
        with pytest.raises(ValueError, match=message):
            index.query(queries, 2, rerank=4, train=train)


def test_rerank_refuses_another_training_record(tmp_path: Path) -> None:
    for name, noise in (("one", 1), ("two", 2)):
        recorder = rs.TrainingRecorder(tmp_path / name, 7, SCHEDULER)
        for checkpoint in STATES:
            recorder.step(np.arange(7), np.arange(7) * 10, noise, 0.1)
            recorder.checkpoint(checkpoint)
    store = grow(None, 7, rs.Recorded(tmp_path / "one"), grow=False)
    index = rs.build_index(store, rs.ReTrac(), None)
    queries = rs.Samples(GENERATED, TASK, STATES, PLANS[1])
    same, other = (rs.Samples(IMAGES, TASK, STATES, rs.Recorded(tmp_path / name)) for name in ("one", "two"))
    assert index.query(queries, 2, rerank=4, train=same).ids.shape == (2, 2)
    with pytest.raises(ValueError, match=r"other timesteps or noise than Recorded\(.*two.*use the same record"):
        index.query(queries, 2, rerank=4, train=other)


def test_workers_know_which_measure_self_influence_is_asked_of(tmp_path: Path) -> None:
    grow(tmp_path / "s", 5, PLANS[1], grow=False)
    task = rs.DiffusionTask(tiny_unet(), SCHEDULER, measure="l1")
    options: dict[str, Any] = {"projection": rs.CountSketch(16), "checkpoints": STATES, "progress": False}
    store = rs.sketch(task, Labelled(IMAGES[:5]), tmp_path / "s", timesteps=PLANS[1], grow=True, **options)
    assert store.fingerprint["measure"] == "l1"
    with Client(n_workers=1, threads_per_worker=1, processes=False, dashboard_address=":0") as client:
        there = rs.self_influence(store, rs.TracIn(), client=client)
    np.testing.assert_array_equal(there, rs.self_influence(store, rs.TracIn()))


def test_workers_answer_from_no_other_index_than_the_callers(tmp_path: Path) -> None:
    def extended(rows: slice) -> rs.Index:
        sketches = np.random.default_rng(0).standard_normal((60, 1, 8))[rows]
        with rs.StoreWriter(tmp_path / "s") as writer:
            writer.append(np.arange(60)[rows], {"c": sketches}, timesteps=[3])
        return rs.build_index(rs.open_store(tmp_path / "s"), rs.TracIn(), tmp_path / "i")

    before = for_workers(extended(slice(0, 40)))
    after = for_workers(extended(slice(40, 60)))
    for _ in range(2):
        with pytest.raises(rs.StaleIndexError, match="built again after it was opened"):
            opened(before)
    assert opened(after).shape[1] == 60


def test_samples_are_taken_from_a_grown_store(tmp_path: Path) -> None:
    grow(tmp_path / "s", 5, PLANS[0], grow=False)
    grow(tmp_path / "s", 7, PLANS[0])
    store = grow(tmp_path / "s", 7, PLANS[1])
    taken = rs.take(store, [6, 2])
    assert taken.fingerprint["timesteps"] == [plan.spec() for plan in PLANS]
    assert taken.ids.tolist() == [6, 2]
    for name in STATES:
        np.testing.assert_array_equal(taken.sketches(name), store.sketches(name)[[6, 2]])
        np.testing.assert_array_equal(taken.timesteps(name), [[20, 70, 50]] * 2)
    np.testing.assert_array_equal(rs.take(taken, [2]).norms("late"), store.norms("late")[[2]])
    answer = rs.build_index(store, rs.ReTrac(pairing="matched"), None).query(taken, 1)
    assert answer.ids.ravel().tolist() == [6, 2]
    queries = rs.Samples(GENERATED, TASK, STATES, PLANS[1])
    with pytest.raises(ValueError, match="needs an index of a whole store"):
        rs.build_index(taken, rs.ReTrac(), None).query(
            queries, 1, rerank=2, train=rs.Samples(IMAGES, TASK, STATES, PLANS)
        )
