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
from sklearn.covariance import ledoit_wolf_shrinkage
from torch import nn
from trak import TRAKer

import retrac_scale as rs
from retrac_scale.estimators import fitting
from retrac_scale.estimators.ridge import moments, solve
from retrac_scale.projections import TrakProjector
from tests import oracle
from tests.conftest import random_images, tiny_unet
from tests.test_dense import SquaredError
from tests.test_sketching import SCHEDULER, run

K, DAMPING = 12, 0.3


def inverse(g: Any) -> Any:
    """(sum_i phi_i phi_i^T + damping x mean eigenvalue x I)^-1 of gradients `[n, t, k]`, the obvious way."""
    phi = g.mean(1)
    gram = sum(np.outer(row, row) for row in phi)
    return np.linalg.inv(gram + DAMPING * np.trace(gram) / K * np.eye(K))


def unit(g: Any) -> Any:
    return g / np.linalg.norm(g, axis=-1, keepdims=True)


def residuals(losses: Any) -> Any:
    rmse = np.sqrt(losses)
    return (rmse / np.linalg.norm(rmse, axis=1, keepdims=True)).mean(1)


ROWS: dict[str, tuple[Any, Callable[[Any, Any], Any], bool]] = {
    "TRAK": (rs.TRAK(DAMPING), lambda g, _: g.mean(1) @ inverse(g), False),
    "TRAK squared": (rs.TRAK(DAMPING, squared=True), lambda g, _: g.mean(1) @ inverse(g), True),
    "RelatIF": (rs.RelatIF(DAMPING), lambda g, _: unit(g.mean(1) @ inverse(g)), False),
    "RenormIF": (
        rs.RenormIF(DAMPING),
        lambda g, _: g.mean(1) @ inverse(g) / np.linalg.norm(g.mean(1), axis=1, keepdims=True),
        False,
    ),
    "DTRAK": (rs.DTRAK(DAMPING), lambda g, _: g.mean(1) @ inverse(g), False),
    "DAS": (rs.DAS(DAMPING), lambda g, x: (unit(g).mean(1) @ inverse(g)) * residuals(x)[:, None], True),
    "GradDot": (rs.GradDot(), lambda g, _: g.mean(1), False),
}
"""An estimator, its training rows from gradients `[n, t, k]` and losses `[n, t]`, and whether its score is a square."""


def stores(seed: int, n: int, checkpoints: int, out: Path | None = None) -> tuple[Any, Any, Any]:
    """Training side, queries, and the training losses."""
    rng = np.random.default_rng(seed)
    names = ["a", "b", "c"][:checkpoints]
    train = {name: rng.standard_normal((n, 2, K)) * rng.gamma(2, 1, (n, 1, 1)) for name in names}
    losses = {name: rng.gamma(2, 1, (n, 2)) for name in names}
    asked = {name: rng.standard_normal((3, 2, K)) for name in names}
    weights = [0.25, 1.5, 0.5][:checkpoints]
    columns = {"label": np.arange(n) % 4}
    store = rs.write_store(out, train, losses=losses, weights=weights, dtype="float32", columns=columns)
    return store, rs.write_store(None, asked, dtype="float32"), losses


def expected_scores(name: str, store: Any, queries: Any, losses: Any) -> Any:
    """Float64 scores `[q, n]` from the stored sketches."""
    _, rows, squared = ROWS[name]
    total: Any = 0
    for c, weight in store.weights.items():
        g, asked = (side.sketches(c).astype(np.float64) for side in (store, queries))
        total = total + weight * asked.mean(1) @ rows(g, losses[c]).T
    return total**2 if squared else total


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("n", [5, 100])
@pytest.mark.parametrize("checkpoints", [1, 3])
def test_scores_equal_float64_numpy_with_fewer_and_with_more_rows_than_entries(
    name: str, n: int, checkpoints: int
) -> None:
    store, queries, losses = stores(0, n, checkpoints)
    index = rs.build_index(store, ROWS[name][0], None, dtype="float32")
    expected = expected_scores(name, store, queries, losses)
    scale = np.abs(expected).max()
    np.testing.assert_allclose(index.scores(queries).compute(), expected, atol=1e-6 * scale)
    answer = index.query(queries, 5)
    np.testing.assert_allclose(answer.scores, -np.sort(-expected, axis=1)[:, :5], atol=1e-6 * scale)
    np.testing.assert_allclose(answer.scores, np.take_along_axis(expected, answer.ids, 1), atol=1e-6 * scale)


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


@pytest.mark.parametrize("name", ["TRAK", "RelatIF", "DAS"])
def test_self_influence_is_the_diagonal(name: str) -> None:
    store, _, losses = stores(1, 30, 3)
    expected = np.diag(expected_scores(name, store, store, losses))
    np.testing.assert_allclose(
        rs.self_influence(store, ROWS[name][0]), expected, rtol=1e-4, atol=1e-6 * np.abs(expected).max()
    )


@pytest.mark.parametrize("n", [5, 40])
def test_a_ridge_added_up_in_parts_on_workers_without_deleted_samples_is_the_same(
    n: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, queries, losses = stores(2, n + 2, 3, tmp_path / "s")
    store.delete([1, n])
    monkeypatch.setattr(fitting, "RUN_ROWS", 7)
    monkeypatch.setattr(fitting, "PIECE_BYTES", 3 * 4 * 2 * K)
    kept = np.setdiff1d(np.arange(n + 2), [1, n])
    some, left = rs.take(store, kept), {c: values[kept] for c, values in losses.items()}
    here = rs.build_index(store, rs.TRAK(DAMPING), tmp_path / "here", dtype="float32")
    expected = expected_scores("TRAK", some, queries, left)
    np.testing.assert_allclose(here.scores(queries).compute(), expected, atol=1e-6 * np.abs(expected).max())
    assert here.meta["fit"]["b"]["rows"] == n
    assert here.meta["fit"]["b"]["damping"] == DAMPING
    with Client(n_workers=1, threads_per_worker=2, processes=False, dashboard_address=":0") as client:
        rs.build_index(store, rs.TRAK(DAMPING), tmp_path / "there", client=client, dtype="float32")
    for file in (tmp_path / "here").rglob("*"):
        if file.is_file():
            assert file.read_bytes() == (tmp_path / "there" / file.relative_to(tmp_path / "here")).read_bytes()
    again = rs.build_index(store, rs.TRAK(DAMPING), tmp_path / "here", dtype="float32")
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
        damping = penalty * dim / np.square(gradients.astype(np.float64)).sum()
        asked_store = rs.write_store(None, {"c": targets[:, None]}, dtype="float32")
        ours = rs.build_index(store, rs.TRAK(damping), None, dtype="float32").scores(asked_store).compute()
        assert min(spearmanr(a, b).statistic for a, b in zip(ours, theirs, strict=True)) >= 0.999
        rounded = rs.build_index(store, rs.TRAK(damping), None).scores(asked_store).compute()
        assert spearmanr(rounded.ravel(), theirs.ravel()).statistic >= 0.999


def chosen_damping(rows: Any) -> float:
    found = {solve(moments([rows[:1], rows[1:]], K, dual=dual), "auto").damping for dual in (False, True)}
    np.testing.assert_allclose(max(found), min(found), rtol=1e-6)
    return min(found)


@given(n=st.integers(2, 60), seed=st.integers(0, 99), scale=st.sampled_from([1e-4, 1.0, 1e4]))
def test_automatic_damping_is_ledoit_and_wolf_shrinkage_whatever_the_scale(n: int, seed: int, scale: float) -> None:
    rng = np.random.default_rng(seed)
    rows = (scale * rng.standard_normal((n, K)) * np.geomspace(1, 0.05, K)).astype(np.float32)
    share = ledoit_wolf_shrinkage(rows.astype(np.float64), assume_centered=True)
    expected = share / (1 - share) if share < 0.999 else 1e3
    np.testing.assert_allclose(chosen_damping(rows), np.clip(expected, 1e-6, 1e3), rtol=1e-4)


def test_automatic_damping_brings_the_second_moments_nearer_to_the_truth() -> None:
    rng = np.random.default_rng(0)
    deviations = np.geomspace(1, 0.1, K)
    errors: dict[float, list[float]] = {}
    for _ in range(40):
        rows = (rng.standard_normal((25, K)) * deviations).astype(np.float32)
        gram, chosen = rows.T.astype(np.float64) @ rows, chosen_damping(rows)
        for factor in (0.0, 0.1, 1.0, 10.0):
            damping = factor * chosen
            estimate = (gram + damping * np.trace(gram) / K * np.eye(K)) / (1 + damping) / 25
            errors.setdefault(factor, []).append(float(((estimate - np.diag(deviations**2)) ** 2).sum()))
    mean = {factor: np.mean(values) for factor, values in errors.items()}
    assert mean[1.0] == min(mean.values())
    assert mean[1.0] < 0.9 * mean[0.0]


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
    with pytest.raises(ValueError, match="TRAK mixes the timesteps of all samples"):
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
            noise = rs.draw_noise(images.shape[1:], [sample], [timestep], 0).double()
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
