"""Estimators with a ridge, measurements and preconditioning against float64 NumPy and autograd."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from distributed import Client
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import spearmanr
from torch import nn
from trak import TRAKer

import retrac_scale as rs
from retrac_scale.estimators import fitting
from retrac_scale.estimators.ridge import AUTO, Moments, solve
from retrac_scale.projections import TrakProjector
from tests import oracle
from tests.conftest import random_images, tiny_unet
from tests.projections.test_dense import SquaredError
from tests.sketching.test_sketching import SCHEDULER, run

K, DAMPING = 12, 0.3


def inverse(rows: Any) -> Any:
    """(sum_i phi_i phi_i^T + lambda I)^-1 of rows `[n, k]`, lambda = damping x mean of min(n, k) eigenvalues."""
    gram = sum(np.outer(row, row) for row in rows)
    return np.linalg.inv(gram + DAMPING * np.trace(gram) / min(rows.shape) * np.eye(rows.shape[1]))


def unit(g: Any) -> Any:
    return g / np.linalg.norm(g, axis=-1, keepdims=True)


Row = Callable[[Any, Any, Any], Any]
ROWS: dict[str, tuple[Any, Row]] = {
    "TRAK": (rs.TRAK, lambda phi, u, r: phi @ inverse(phi)),
    "RelatIF": (rs.RelatIF, lambda phi, u, r: unit(phi @ inverse(phi))),
    "RenormIF": (rs.RenormIF, lambda phi, u, r: phi @ inverse(phi) / np.linalg.norm(phi, axis=1, keepdims=True)),
    "DTRAK": (rs.DTRAK, lambda phi, u, r: phi @ inverse(phi)),
    "DAS": (rs.DAS, lambda phi, u, r: (u @ inverse(phi)) * r[:, None]),
}
"""An estimator, and its training rows from means of gradients and of directions `[n, k]` and weights `[n]`."""

ESTIMATORS: dict[str, Any] = {
    **{name: kind(DAMPING) for name, (kind, _) in ROWS.items()},
    "TRAK squared": rs.TRAK(DAMPING, squared=True),
    "TRAK of directions": rs.TRAK(DAMPING, directions=True),
    **{f"{name} matched": kind(DAMPING, pairing="matched") for name, (kind, _) in ROWS.items()},
    "DAS matched, signed": rs.DAS(DAMPING, squared=False, pairing="matched"),
    "ReTracRidge": rs.ReTracRidge(DAMPING),
    "ReTracRidge squared": rs.ReTracRidge(DAMPING, squared=True),
    "GradDot": rs.GradDot(),
}


def stores(seed: int, n: int, checkpoints: int, out: Path | None = None, t: int = 2) -> tuple[Any, Any, Any]:
    """Training side, queries, and the training losses; gradients are far longer at some timesteps than at others."""
    rng = np.random.default_rng(seed)
    names = ["a", "b", "c"][:checkpoints]
    lengths = np.geomspace(1, 100, t)[:, None]
    train = {name: lengths * rng.standard_normal((n, t, K)) * rng.gamma(2, 1, (n, 1, 1)) for name in names}
    losses = {name: rng.gamma(2, 1, (n, t)) for name in names}
    asked = {name: lengths * rng.standard_normal((3, t, K)) for name in names}
    weights = [0.25, 1.5, 0.5][:checkpoints]
    options: dict[str, Any] = {"dtype": "float32", "timesteps": np.arange(t) * 10}
    columns = {"label": np.arange(n) % 4}
    store = rs.write_store(out, train, losses=losses, weights=weights, columns=columns, **options)
    return store, rs.write_store(None, asked, **options), losses


def parts_of_scores(estimator: Any, store: Any, queries: Any, losses: Any) -> Any:
    """What each checkpoint and timestep contributes in float64, `[c, t, q, n]`; cross pairing has one timestep."""
    found = []
    for c, weight in store.weights.items():
        g, asked = (side.sketches(c).astype(np.float64) for side in (store, queries))
        rmse = np.sqrt(losses[c])
        r = rmse / np.linalg.norm(rmse, axis=1, keepdims=True)
        directions = getattr(estimator, "directions", False)
        phi, own = (unit(x) if directions else x for x in (g, asked))
        sides = [phi, own, unit(g), r]
        if estimator.pairing == "cross":
            sides = [x.mean(1, keepdims=True) for x in sides]
        phi, own, u, r = (np.moveaxis(x, 1, 0) for x in sides)
        kind = "TRAK" if isinstance(estimator, rs.ReTracRidge) else type(estimator).__name__
        row: Row = ROWS[kind][1] if kind in ROWS else lambda phi, u, r: phi
        found.append([weight * q @ row(*one).T for q, one in zip(own, zip(phi, u, r, strict=True), strict=True)])
    return np.array(found)


def expected_scores(estimator: Any, store: Any, queries: Any, losses: Any) -> Any:
    """Float64 scores `[q, n]` from the stored sketches."""
    total = parts_of_scores(estimator, store, queries, losses).sum((0, 1))
    return total**2 if estimator.squared else total


@pytest.mark.parametrize("name", ESTIMATORS)
@pytest.mark.parametrize(("n", "t"), [(5, 1), (5, 5), (100, 2), (100, 5)])
@pytest.mark.parametrize("checkpoints", [1, 3])
def test_scores_equal_float64_numpy_with_fewer_and_with_more_rows_than_entries(
    name: str, n: int, t: int, checkpoints: int
) -> None:
    estimator = ESTIMATORS[name]
    store, queries, losses = stores(0, n, checkpoints, t=t)
    index = rs.build_index(store, estimator, None, dtype="float32")
    expected = expected_scores(estimator, store, queries, losses)
    scale = np.abs(expected).max()
    np.testing.assert_allclose(index.scores(queries).compute(), expected, atol=2e-6 * scale)
    answer = index.query(queries, 5)
    np.testing.assert_allclose(answer.scores, -np.sort(-expected, axis=1)[:, :5], atol=2e-6 * scale)
    np.testing.assert_allclose(answer.scores, np.take_along_axis(expected, answer.ids, 1), atol=2e-6 * scale)
    rounded = rs.build_index(store, estimator, None).scores(queries).compute()  # int8: no timestep drowns in another
    assert min(spearmanr(*pair).statistic for pair in zip(rounded, expected, strict=True)) > (0.98 if n > 5 else 0.85)


@pytest.mark.parametrize("name", ["TRAK matched", "RelatIF matched", "ReTracRidge", "ReTracRidge squared"])
@pytest.mark.parametrize("n", [5, 30, 100])
def test_matched_ridges_are_taken_apart_by_checkpoint_and_timestep(name: str, n: int) -> None:
    store, queries, losses = stores(4, n, 3, t=4)
    index = rs.build_index(store, ESTIMATORS[name], None, dtype="float32")
    expected = parts_of_scores(ESTIMATORS[name], store, queries, losses)
    for query, sample in ((0, 3), (2, 0)):
        found = index.explain(rs.take(queries, [query]), sample)
        np.testing.assert_allclose(
            np.einsum("ctt->ct", found.contributions), expected[:, :, query, sample], atol=1e-5 * np.abs(expected).max()
        )
        total = found.contributions.sum()
        assert found.score == pytest.approx(total**2 if index.estimator.squared else total, rel=1e-9)


def test_retrac_averages_over_the_visits_made_and_tracin_adds_them_up() -> None:
    """One direction, visited 3, 1 and 0 of 3 times, each time with another length."""
    direction = np.array([0.6, 0.8, 0.0, 0.0])
    lengths = np.array([[1.0, 2.0, 4.0], [0.0, 0.0, 5.0], [0.0, 0.0, 0.0]])
    steps = np.where(lengths > 0, 7, -1)
    train = {"c": lengths[..., None] * direction}
    store = rs.write_store(None, train, timesteps={"c": steps}, dtype="float32")
    query = rs.write_store(None, {"c": direction[None, None]}, timesteps=[7], dtype="float32")
    retrac = rs.build_index(store, rs.ReTrac(), None, dtype="float32")
    np.testing.assert_allclose(retrac.scores(query).compute(), [[1, 1, 0]], rtol=1e-6)
    np.testing.assert_allclose(rs.self_influence(store, rs.ReTrac()), [1, 1, 0], rtol=1e-6)
    explanation = retrac.explain(query, 1)
    np.testing.assert_allclose(explanation.contributions, [[[0], [0], [1]]], rtol=1e-6)
    assert explanation.score == pytest.approx(1)
    tracin = rs.build_index(store, rs.TracIn(), None, dtype="float32")
    np.testing.assert_allclose(tracin.scores(query).compute(), [[7 / 3, 5 / 3, 0]], rtol=1e-6)


@pytest.mark.parametrize("n", [30, 100])
@pytest.mark.parametrize("name", ["TRAK", "RelatIF", "DAS", "ReTracRidge", "DAS matched"])
def test_self_influence_is_the_diagonal(name: str, n: int) -> None:
    store, _, losses = stores(1, n, 3)
    expected = np.diag(expected_scores(ESTIMATORS[name], store, store, losses))
    np.testing.assert_allclose(
        rs.self_influence(store, ESTIMATORS[name]), expected, rtol=1e-4, atol=1e-6 * np.abs(expected).max()
    )


@pytest.mark.parametrize("name", ["TRAK", "ReTracRidge"])
@pytest.mark.parametrize("n", [5, 100])
def test_a_ridge_added_up_in_parts_on_workers_without_deleted_samples_is_the_same(
    n: int, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    estimator = ESTIMATORS[name]
    store, queries, losses = stores(2, n + 2, 3, tmp_path / "s")
    store.delete([1, n])
    monkeypatch.setattr(fitting, "RUN_ROWS", 7)
    monkeypatch.setattr(fitting, "PIECE_BYTES", 3 * 4 * 2 * K)
    kept = np.setdiff1d(np.arange(n + 2), [1, n])
    some, left = rs.take(store, kept), {c: values[kept] for c, values in losses.items()}
    here = rs.build_index(store, estimator, tmp_path / "here", dtype="float32")
    expected = expected_scores(estimator, some, queries, left)
    np.testing.assert_allclose(here.scores(queries).compute(), expected, atol=2e-6 * np.abs(expected).max())
    fits = here.meta["fit"]["b"] if name == "ReTracRidge" else [here.meta["fit"]["b"]]
    assert [(fit["rows"], fit["damping"]) for fit in fits] == [(n, DAMPING)] * here.meta["slots"]
    with Client(n_workers=1, threads_per_worker=2, processes=False, dashboard_address=":0") as client:
        rs.build_index(store, estimator, tmp_path / "there", client=client, dtype="float32")
    for file in (tmp_path / "here").rglob("*"):
        if file.is_file():
            assert file.read_bytes() == (tmp_path / "there" / file.relative_to(tmp_path / "here")).read_bytes()
    again = rs.build_index(store, estimator, tmp_path / "here", dtype="float32")
    assert again.meta == rs.open_index(tmp_path / "here").meta == here.meta


def test_trak_ranks_as_traker_does_on_the_same_projected_gradients(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 60), nn.Tanh(), nn.Linear(60, 3)).eval()
    train, queries = (torch.randn(60, 6), torch.randn(60, 3)), (torch.randn(10, 6), torch.randn(10, 3))
    shapes = {name: tuple(value.shape) for name, value in model.named_parameters()}
    penalty = 1e-3
    for dim in (32, 128):
        traker = TRAKer(
            model,
            SquaredError(),
            train_set_size=60,
            save_dir=str(tmp_path / str(dim)),
            projector=TrakProjector(rs.CountSketch(dim), shapes),
            device="cpu",
            use_half_precision=False,
            logging_level="ERROR",
            lambda_reg=penalty,
        )
        traker.load_checkpoint(model.state_dict(), model_id=0)
        traker.featurize(train, num_samples=60)
        gradients = np.array(traker.saver.current_store["grads"])
        traker.finalize_features()
        traker.start_scoring_checkpoint("queries", model.state_dict(), model_id=0, num_targets=10)
        traker.score(queries, num_samples=10)
        targets = np.array(traker.saver.current_store["queries_grads"])
        theirs = np.array(traker.finalize_scores("queries")).T
        store = rs.write_store(None, {"c": gradients[:, None]}, dtype="float32")
        damping = penalty * min(dim, 60) / np.square(gradients.astype(np.float64)).sum()
        asked_store = rs.write_store(None, {"c": targets[:, None]}, dtype="float32")
        ours = rs.build_index(store, rs.TRAK(damping), None, dtype="float32").scores(asked_store).compute()
        assert min(spearmanr(a, b).statistic for a, b in zip(ours, theirs, strict=True)) >= 0.999
        rounded = rs.build_index(store, rs.TRAK(damping), None).scores(asked_store).compute()
        assert spearmanr(rounded.ravel(), theirs.ravel()).statistic >= 0.999


@pytest.mark.parametrize("n", [5, 40])
def test_automatic_damping_is_a_share_of_the_mean_eigenvalue_whatever_the_scale(n: int) -> None:
    rows = np.random.default_rng(0).standard_normal((n, K)).astype(np.float32)
    mean = np.square(rows.astype(np.float64)).sum() / min(n, K)
    for scale in (1e-4, 1, 1e4):
        for dual in (False, True):
            halves = [Moments.of(some * scale, "auto", dual=dual) for some in (rows[:2], rows[2:])]
            ridge = solve(halves[0] + halves[1], "auto")
            assert ridge.penalty == pytest.approx(AUTO * mean * scale**2, rel=1e-6)


@given(seed=st.integers(0, 99), n=st.integers(1, 90), k=st.integers(1, 12), zeros=st.booleans())
def test_a_squared_answer_holds_the_largest_squares_once_each(seed: int, n: int, k: int, zeros: bool) -> None:
    rng = np.random.default_rng(seed)
    train = rng.standard_normal((n, 1, K))
    if zeros:
        train[rng.random(n) < 0.5] = 0
        train[0] = 1
    store = rs.write_store(None, {"a": train}, dtype="float32", columns={"label": np.arange(n) % 4})
    queries = rs.take(store, store.ids[:2])
    index = rs.build_index(store, rs.TRAK(1.0, squared=True), None, dtype="float32")
    plain = rs.build_index(store, rs.TRAK(1.0), None, dtype="float32").scores(queries).compute()
    answer = index.query(queries, k)
    assert answer.ids.shape == (len(queries.ids), min(k, n))
    assert all(len(set(row)) == len(row) for row in answer.ids.tolist())
    np.testing.assert_allclose(answer.scores, -np.sort(-(plain**2), axis=1)[:, :k], rtol=1e-5, atol=1e-12)
    assert answer.errors is None
    assert answer.resolved is None
    groups = index.query(queries, 4, group_by="label")
    for row, ids, scores in zip(plain, groups.ids, groups.scores, strict=True):
        sums = [(row[store.columns["label"] == label] ** 2).sum() for label in ids]
        np.testing.assert_allclose(scores, sums, rtol=1e-4, atol=1e-12)


def test_what_a_ridge_cannot_do_is_refused_with_the_reason() -> None:
    store, queries, _ = stores(3, 5, 1)
    with pytest.raises(
        ValueError, match="checkpoint 'a': the Gram matrix of 5 rows of 12 entries is singular with dam"
    ):
        rs.build_index(store, rs.TRAK(0), None)
    alike = rs.write_store(None, {"a": np.stack([np.eye(5), np.ones((5, 5))], 1)}, timesteps=[0, 10])
    with pytest.raises(ValueError, match="checkpoint 'a', timestep 10: the Gram matrix of 5 rows"):
        rs.build_index(alike, rs.TRAK(1e-18, pairing="matched"), None)
    with pytest.raises(ValueError, match="all gradients are zero"):
        rs.build_index(rs.write_store(None, {"a": np.zeros((4, 1, 3))}), rs.TRAK(), None)
    with pytest.raises(ValueError, match="damping must be"):
        rs.TRAK(-1)
    with pytest.raises(ValueError, match="DAS needs each pair's loss, which the store lacks"):
        rs.build_index(queries, rs.DAS(), None)
    with pytest.raises(ValueError, match="needs the ridge over all training rows"):
        rs.TRAK().train_rows(store, "a")
    index = rs.build_index(store, rs.TRAK(squared=True), None)
    with pytest.raises(ValueError, match="has no opponents"):
        index.query(queries, side="opponents")
    with pytest.raises(ValueError, match="TRAK has one ridge over the means of all timesteps"):
        index.explain(rs.take(queries, [0]), 0)


OUTPUTS: dict[str, Callable[[Any], Any]] = {
    "mean_output": lambda x: x.mean(),
    "mean_squared_output": lambda x: (x**2).mean(),
    "output_l1": lambda x: x.abs().sum(),
    "output_l2": lambda x: (x**2).sum().sqrt(),
    "output_linf": lambda x: x.abs().max(),
}


@pytest.mark.parametrize("measure", OUTPUTS)
def test_measured_functions_of_the_output_equal_autograd_and_keep_the_squared_error(measure: str) -> None:
    model, images = tiny_unet(), random_images(2)
    store = run(model, images, rs.Explicit([40, 7]), measure=measure)
    reference = copy.deepcopy(model).double()
    for sample in range(2):
        for column, timestep in enumerate([40, 7]):
            noise = rs.draw_noise(images.shape[1:], None, [timestep], 0).double()
            noisy = SCHEDULER.add_noise(images[[sample]].double(), noise, torch.tensor([timestep]))
            output = reference(noisy, timestep).sample
            expected = oracle.gradient(reference, OUTPUTS[measure](output)).numpy()
            found = store.sketches("last")[sample, column]
            assert np.linalg.norm(found - expected) < 1e-4 * np.linalg.norm(expected)
            error = float(((output - noise) ** 2).mean().detach())
            np.testing.assert_allclose(store.losses("last")[sample, column], error, rtol=1e-5)


def test_dtrak_and_das_refuse_a_store_that_was_measured_with_another_function(tmp_path: Path) -> None:
    model, images = tiny_unet(), random_images(4)
    sketch: dict[str, Any] = {"projection": rs.CountSketch(8), "out": tmp_path / "s"}
    store = run(model, images, rs.Explicit([40, 7]), **sketch)
    for measure in ("mean_output", "output_l2"):
        run(model, images, rs.Explicit([40, 7]), measure=measure, grow=True, **sketch)
    for estimator, functions in (
        (rs.DTRAK(), "mean_squared_output or output_l1 or output_l2 or output_linf"),
        (rs.DAS(), "mean_output"),
    ):
        message = f"{type(estimator).__name__} differentiates {functions}, but .* was measured with 'mse'; sketch with"
        for action in (rs.self_influence, lambda s, e: rs.build_index(s, e, None)):
            with pytest.raises(ValueError, match=message):
                action(store, estimator)
    means, norms = (rs.open_store(tmp_path / "s", measure=measure) for measure in ("mean_output", "output_l2"))
    assert (rs.build_index(means, rs.DAS(), tmp_path / "i").query(means, 4).scores >= 0).all()
    assert rs.self_influence(norms, rs.DTRAK()).shape == (4,)
    with pytest.raises(ValueError, match="measure is 'mean_output' there and 'mse' here"):
        rs.open_index(tmp_path / "i").query(store)


@pytest.mark.parametrize("damping", [np.float32(0.5), np.float64(0.5), np.int64(2), 2, 0.5])
def test_damping_may_be_a_number_of_numpy(damping: Any, tmp_path: Path) -> None:
    store = rs.write_store(tmp_path / "s", {"c": np.eye(4, dtype=np.float32)[:, None]})
    rs.build_index(store, rs.TRAK(damping), tmp_path / "i")
    assert rs.open_index(tmp_path / "i").estimator == rs.TRAK(float(damping))


@pytest.mark.parametrize("damping", [True, np.True_, -1, np.inf, np.float32(np.nan), "0.5", None])
def test_what_is_no_damping_is_refused(damping: Any) -> None:
    with pytest.raises(ValueError, match='damping must be "auto" or a number of 0 or more'):
        rs.TRAK(damping)


@pytest.mark.parametrize("estimator", [rs.ReTracRidge(), rs.TracIn(), rs.TRAK()])
def test_no_queries_are_told_as_such(estimator: rs.Estimator) -> None:
    store = rs.write_store(None, {"a": np.random.default_rng(0).standard_normal((4, 2, 8))}, timesteps=[1, 5])
    with pytest.raises(ValueError, match="the store has no sample to ask about"):
        rs.build_index(store, estimator).query(rs.take(store, []), 2)
