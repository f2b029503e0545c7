"""How far two runs would agree: against halves answered by plain NumPy, and against runs that were really made."""

from __future__ import annotations

import itertools
import math
import warnings
from typing import Any

import numpy as np
import pytest
from scipy.stats import spearmanr

import retrac_scale as rs
from retrac_scale.measurement.halves import MeasuredOnceError, Repeatability, pairs_of_parts
from tests import oracle
from tests.small_denoiser import SCHEDULER, SmallDenoiser, images

N, Q, K, TOP = 30, 5, 12, 4


def noisy(t: int, seed: int = 0, c: int = 2, n: int = N, luck: float = 2.0) -> dict[str, Any]:
    """Gradients that share a part over timesteps, `{c: [n, t, K]}`."""
    rng = np.random.default_rng(seed)
    return {
        f"c{i}": (rng.standard_normal((n, 1, K)) + luck * rng.standard_normal((n, t, K))).astype(np.float32)
        for i in range(c)
    }


def stored(sketches: dict[str, Any], **options: Any) -> rs.SketchStore:
    t = next(iter(sketches.values())).shape[1]
    arguments = {"timesteps": [10 * (i + 1) for i in range(t)], "weights": [1.0, 0.5][: len(sketches)], **options}
    return rs.write_store(None, sketches, dtype="float32", **arguments)


def of_matched_ridge(train: Any, queries: Any, weights: Any, damping: float) -> Any:
    """sum_c w_c sum_t u(q,t)^T (K_t + lambda I)^-1 u(i,t) with all of the ridges' parts, `[t, q, n]`."""
    total: Any = 0
    for c in train:
        u, v = (g.astype(np.float64) / np.linalg.norm(g, axis=2, keepdims=True) for g in (train[c], queries[c]))
        parts = []
        for t in range(u.shape[1]):
            gram = u[:, t].T @ u[:, t]
            penalty = damping * np.trace(gram) / min(gram.shape[0], len(u)) * np.eye(len(gram))
            parts.append(v[:, t] @ np.linalg.solve(gram + penalty, u[:, t].T))
        total = total + weights[c] * np.array(parts)
    return total


def lists(scores: Any, k: int) -> Any:
    return np.argsort(-scores, axis=1, kind="stable")[:, :k]


def shares(one: Any, other: Any, k: int) -> list[float]:
    """Of the top k of scores `[q, n]`, what both have."""
    return [len(set(a) & set(b)) / k for a, b in zip(lists(one, k), lists(other, k), strict=True)]


@pytest.mark.parametrize("t", [2, 4, 5, 8])
def test_overlaps_under_matched_pairing_are_those_of_parts_answered_by_numpy(t: int) -> None:
    train, asked = noisy(t), noisy(t, seed=1, n=Q)
    store, queries = stored(train), stored(asked)
    found = rs.repeatability(rs.build_index(store, rs.ReTracRidge(0.3), dtype="float32"), queries, k=TOP)
    by_part = of_matched_ridge(train, asked, store.weights, 0.3)
    assert found.measurements == t
    assert sorted(found.overlaps) == sorted({t // 2, t // 4, t // 8} - {0})
    for m, pairs in pairs_of_parts(t).items():
        scores: Any = [[by_part[list(part)].sum(0) for part in pair] for pair in pairs]
        np.testing.assert_allclose(found.overlaps[m], [shares(one, other, TOP) for one, other in scores])
        if m == t // 2:
            expected = [[spearmanr(a, b).statistic for a, b in zip(*pair, strict=True)] for pair in scores]
            np.testing.assert_allclose(found.correlations, expected, atol=1e-3)
    np.testing.assert_allclose(found.by_query, found.overlaps[t // 2].mean(0))


@pytest.mark.parametrize("estimator", [rs.TracIn(), rs.ReTrac(), rs.GradCos()])
def test_overlaps_under_cross_pairing_are_those_of_parts_answered_by_numpy(estimator: Any) -> None:
    train, asked = noisy(4), noisy(4, seed=1, n=Q)
    store, queries = stored(train), stored(asked)
    found = rs.repeatability(store, queries, estimator, k=TOP)
    references: Any = {"TracIn": oracle.tracin, "ReTrac": oracle.retrac, "GradCos": oracle.grad_cos}
    reference = references[type(estimator).__name__]
    assert sorted(found.overlaps) == [1, 2]
    for m, pairs in pairs_of_parts(4).items():
        expected: Any = []
        for pair in pairs[: len(found.overlaps[m])]:
            parts = [[{c: g[:, list(part)] for c, g in side.items()} for side in (train, asked)] for part in pair]
            one, other = (reference(sides[0], sides[1], store.weights) for sides in parts)
            expected.append(shares(one, other, TOP))
        np.testing.assert_allclose(found.overlaps[m], expected)


def test_checkpoints_are_compared_where_each_was_measured_once_under_noise_of_its_own() -> None:
    train, asked = noisy(1, c=2), noisy(1, seed=1, c=2, n=Q)
    store, queries = stored(train), stored(asked)
    found = rs.repeatability(store, queries, rs.ReTrac(), k=TOP)
    assert found.measurements == 2
    one, other = (oracle.retrac({c: train[c]}, {c: asked[c]}, store.weights) for c in train)
    np.testing.assert_allclose(found.overlaps[1], [shares(one, other, TOP)])


@pytest.mark.parametrize("estimator", [rs.TracIn(), rs.ReTracRidge(0.3)])
def test_training_samples_that_are_asked_are_left_out_of_their_own_lists(estimator: Any) -> None:
    train = noisy(4)
    store = stored(train)
    found = rs.repeatability(store, None, estimator, k=TOP)
    answers = []
    for part in pairs_of_parts(4)[2][0]:
        some = {c: g[:, list(part)] for c, g in train.items()}
        if isinstance(estimator, rs.TracIn):
            scores = oracle.tracin(some, some, store.weights)
        else:
            scores = of_matched_ridge(some, some, store.weights, 0.3).sum(0)
        answers.append(np.where(np.eye(N, dtype=bool), -np.inf, scores))
    expected = shares(answers[0], answers[1], TOP)
    np.testing.assert_allclose(found.overlaps[2][0], np.array(expected), atol=1 / TOP / 2)
    assert found.by_query.shape == (N,)


def test_lists_that_would_agree_by_themselves_are_shortened() -> None:
    assert rs.repeatability(stored(noisy(4)), None, rs.TracIn(), k=100).k == (N - 1) // 2
    assert rs.repeatability(stored(noisy(4, n=9))).k == 4
    for few in (1, 2):
        for estimator in (rs.TracIn(), rs.ReTracRidge()):
            with pytest.raises(ValueError, match="fewer than two samples are left to list"):
                rs.repeatability(stored(noisy(4, n=few)), None, estimator)


def test_parts_are_disjoint_halves_and_quarters_and_the_same_at_every_call() -> None:
    for t in range(2, 40):
        pairs = pairs_of_parts(t)
        assert pairs == pairs_of_parts(t)
        assert max(pairs) == t // 2
        for m, some in pairs.items():
            assert some
            assert all(len(one) == len(other) == m and not set(one) & set(other) for one, other in some)
    assert pairs_of_parts(4)[2] == [((0, 1), (2, 3)), ((0, 2), (1, 3)), ((0, 3), (1, 2))]


def made_up(shares_of: dict[int, float], correlation: float = 0.5, t: int = 8) -> Repeatability:
    overlaps = {m: np.full((3, 7), share) for m, share in shares_of.items()}
    return Repeatability(10, t, overlaps, np.full((3, 7), correlation))


def test_the_rank_correlation_is_foretold_by_spearman_and_brown() -> None:
    assert made_up({4: 0.5}, 0.5).rank_correlation.value == pytest.approx(2 * 0.5 / 1.5)
    assert made_up({2: 0.5}, 0.4, t=5).rank_correlation.value == pytest.approx(2.5 * 0.4 / (1 + 1.5 * 0.4))
    assert made_up({4: 0.5}, -0.2).rank_correlation.value == pytest.approx(-0.2)


def test_the_curve_goes_through_the_sizes_that_it_is_fitted_to() -> None:
    def odds(share: float) -> float:
        return math.log(share / (1 - share))

    measured = {m: 1 / (1 + math.exp(-(-1.0 + 0.8 * math.log(m)))) for m in (1, 2, 4)}
    found = made_up(measured)
    for m in (1, 2, 4, 8, 64):
        assert odds(found.foretold(m).value) == pytest.approx(-1.0 + 0.8 * math.log(m))
    assert found.overlap.value == found.foretold(8).value
    assert found.halves.value == pytest.approx(measured[4])


@pytest.mark.parametrize("overlaps", [{4: 0.4}, {2: 0.5, 4: 0.6}, {1: 0.2, 2: 0.3, 4: 0.5}, {2: 0.6, 4: 0.5}, {4: 1.0}])
def test_what_is_needed_is_the_least_number_that_is_foretold_to_do(overlaps: dict[int, float]) -> None:
    found = made_up(overlaps)
    for share in (0.3, 0.7, 0.9, 0.95):
        needed = found.needed(share)
        assert found.foretold(needed).value >= share - 1e-9
        assert needed == 1 or found.foretold(needed - 1).value < share
    for m, more in itertools.pairwise((1, 2, 4, 8, 16, 300)):
        assert found.foretold(m).value < found.foretold(more).value
    for wrong in (0, 1, 1.5, -0.2):
        with pytest.raises(ValueError, match="lies between 0 and 1"):
            found.needed(wrong)


def test_a_run_of_eight_foretells_what_runs_of_eight_and_sixteen_share() -> None:
    whole = noisy(32, n=200, c=1)
    asked = noisy(32, n=200, c=1)

    def scored(part: slice) -> Any:
        return oracle.retrac_matched({"c0": whole["c0"][:, part]}, {"c0": asked["c0"][:40, part]}, {"c0": 1.0})

    first = {"c0": whole["c0"][:, :8]}
    found = rs.repeatability(stored(first), rs.take(stored(first), range(40)), rs.ReTrac(pairing="matched"))
    for m in (8, 16):
        really = np.mean(shares(scored(slice(0, m)), scored(slice(m, 2 * m)), 10))
        there = found.foretold(m)
        assert there.low - 0.05 < really < there.high + 0.05


def test_the_interval_of_the_rank_correlation_is_over_splits_too() -> None:
    apart = Repeatability(3, 4, {2: np.full((3, 5), 0.5)}, np.tile([[0.2], [0.5], [0.8]], (1, 5)))
    assert apart.rank_correlation.low < 0.5 < apart.rank_correlation.value < 0.8 < apart.rank_correlation.high


def test_an_index_is_not_asked_for_another_estimator() -> None:
    index = rs.build_index(stored(noisy(4)), rs.ReTrac("matched"), dtype="float32")
    with pytest.raises(ValueError, match="leave estimator out"):
        rs.repeatability(index, None, rs.TRAK())


def test_one_measurement_cannot_tell() -> None:
    for store in (stored(noisy(1, c=1)), sketched(1)):
        for estimator in (None, rs.TracIn(), rs.ReTracRidge()):
            with pytest.raises(MeasuredOnceError, match="measured once, which cannot tell"):
                rs.repeatability(store, estimator=estimator)


def sketched(timesteps: int, noise: Any = "common", n: int = 20) -> rs.SketchStore:
    model = SmallDenoiser()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    plan = rs.EvenlySpaced(timesteps, noise=noise)
    options: dict[str, Any] = {"checkpoints": {"c": state}, "projection": rs.CountSketch(16), "progress": False}
    return rs.sketch(rs.DiffusionTask(model, SCHEDULER), images(n), None, timesteps=plan, **options)


def test_matched_pairing_over_noise_of_their_own_is_warned_of_once_with_the_repeatability() -> None:
    store = sketched(4, "own")
    with pytest.warns(UserWarning, match=r"every sample has noise of its own there: of the top 9, \d") as told:
        index = rs.build_index(store, rs.ReTracRidge())
    assert len(told) == 1
    with pytest.warns(UserWarning, match="measured once, so that nothing tells"):
        rs.build_index(sketched(1, "own"), rs.ReTracRidge())
    with pytest.warns(UserWarning, match="own there; fewer than two samples are left to list, which cannot tell"):
        rs.build_index(sketched(4, "own", 2), rs.ReTracRidge())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        index.query(rs.take(store, [3]), 2)
        rs.build_index(sketched(4), rs.ReTracRidge())
        rs.build_index(store, rs.ReTrac())
        rs.build_index(stored(noisy(4)), rs.ReTracRidge())  # what is not sketched here does not say whose its noise is
