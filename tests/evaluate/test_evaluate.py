import functools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from distributed import Client
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import spearmanr

import retrac_scale as rs
from retrac_scale import evaluate

LISTS = np.array([[1, 2], [2, 3], [2, 1], [4, 2]])


def test_unique_fraction_counts_the_union_of_all_lists() -> None:
    assert evaluate.unique_fraction(LISTS) == 4 / 8
    assert evaluate.unique_fraction(np.arange(12).reshape(3, 4)) == 1


def test_hubs_stand_in_at_least_their_share_of_the_lists() -> None:
    assert [evaluate.hubs(LISTS, share) for share in (0.25, 0.5, 0.75, 1)] == [4, 2, 1, 1]
    assert evaluate.largest_share(LISTS) == 1
    seven_of_a_hundred = np.array([[0]] * 7 + [[row] for row in range(1, 94)])
    assert evaluate.hubs(seven_of_a_hundred, 0.07) == 1  # 0.07 x 100 is more than 7 in floats
    with pytest.raises(ValueError, match=r"share is a part of the lists.*got 0"):
        evaluate.hubs(LISTS, 0)


def test_norm_correlation_is_that_of_mean_scores_and_norms() -> None:
    norms = np.array([1.0, 2, 3, 4])
    assert evaluate.norm_correlation([[0, 1, 2, 9], [0, 1, 2, 3]], norms) == pytest.approx(1)
    assert evaluate.norm_correlation([[5, 0, 0, 1], [5, 2, 4, 2]], norms) == pytest.approx(-0.4)  # means 5, 1, 2, 1.5


def test_detection_equals_its_definitions() -> None:
    found = evaluate.detection([4, 3, 2, 1], [True, False, True, False])
    assert found.auroc == pytest.approx(3 / 4)  # of four pairs one is in the wrong order
    assert found.auprc == pytest.approx((1 / 1 + 2 / 3) / 2)
    assert (found.recall, found.k) == (1 / 2, 2)
    assert evaluate.detection([4, 3, 2, 1], [True, False, True, False], k=3).recall == 1


def test_detection_needs_samples_of_both_kinds() -> None:
    with pytest.raises(ValueError, match="0 of 3 samples are planted"):
        evaluate.detection([1, 2, 3], [False] * 3)
    with pytest.raises(ValueError, match="k must be between 1 and 2"):
        evaluate.detection([1, 2], [True, False], k=3)


def test_detection_names_the_scores_of_deleted_samples() -> None:
    with pytest.raises(ValueError, match=r"1 of 3 scores are NaN.*alive"):
        evaluate.detection([3, 2, np.nan], [True, False, False])


def test_fidelity_of_hand_made_scores() -> None:
    exact, scores = [[4, 3, 2, 1], [1, 2, 3, 4]], [[4, 1, 2, 3], [1, 2, 3, 4]]
    assert evaluate.recall_at(scores, exact, k=2).tolist() == [1 / 2, 1]
    assert evaluate.rank_correlation(scores, exact) == pytest.approx([0.2, 1])  # 1 - 6 (4 + 4) / (4 15)


def test_stability_is_the_mean_jaccard_index_of_all_pairs_of_runs() -> None:
    runs = [np.array([[1, 2, 3]]), np.array([[2, 3, 4]]), np.array([[1, 2, 3]])]
    assert evaluate.stability(runs) == pytest.approx([(2 / 4 + 1 + 2 / 4) / 3])
    with pytest.raises(ValueError, match="two runs or more"):
        evaluate.stability(runs[:1])


def test_bootstrap_resamples_the_rows_of_all_arrays_together() -> None:
    a = np.random.default_rng(0).normal(size=50)
    ratio = evaluate.bootstrap(lambda x, y: y.mean() / x.mean(), a, 3 * a, draws=100)
    assert (ratio.value, ratio.low, ratio.high) == pytest.approx((3, 3, 3))


@pytest.mark.parametrize("interval", [evaluate.bootstrap, evaluate.jackknife])
def test_arrays_that_are_resampled_together_have_as_many_rows(interval: Any) -> None:
    with pytest.raises(ValueError, match="as many rows, got 5, 50"):
        interval(lambda a, b: a.mean() - b.mean(), np.arange(5), np.arange(50))


def test_bootstrap_interval_of_a_mean_is_that_of_the_normal_approximation() -> None:
    a = np.random.default_rng(0).normal(size=400)
    reach = 1.644854 * a.std() / np.sqrt(400)
    interval = evaluate.bootstrap(np.mean, a, draws=4000, level=0.9)
    assert (a.mean() - interval.low) / reach == pytest.approx(1, abs=0.05)
    assert (interval.high - a.mean()) / reach == pytest.approx(1, abs=0.05)


def test_jackknife_error_of_a_mean_is_its_standard_error() -> None:
    a = np.random.default_rng(0).normal(size=30)
    interval = evaluate.jackknife(np.mean, a, level=0.95)
    assert interval.high - interval.value == pytest.approx(1.959964 * a.std(ddof=1) / np.sqrt(30))
    assert f"{evaluate.Interval(0.25, 0.125, 0.5):.2f}" == "0.25 [0.12, 0.50]"


def test_jackknife_interval_of_the_unique_fraction_holds_its_expectation() -> None:
    rng = np.random.default_rng(0)
    popularity = 1 / np.arange(1, 201)

    def lists() -> Any:
        noise = rng.gumbel(size=(64, 200))
        return np.argsort(-(np.log(popularity) + noise), axis=1)[:, :5]

    truth = np.mean([evaluate.unique_fraction(lists()) for _ in range(300)])
    intervals = [evaluate.jackknife(evaluate.unique_fraction, lists()) for _ in range(50)]
    assert np.mean([one.low <= truth <= one.high for one in intervals]) >= 0.9


def test_lds_of_a_hand_made_case() -> None:
    scores = [[1, 2, 4], [1, 2, 4]]
    members = np.array([[1, 1, 0], [1, 0, 1], [0, 1, 1]], bool)  # sums 3, 5, 6
    losses = [[0.9, 0.1], [0.5, 0.5], [0.4, 0.3]]
    assert evaluate.lds(scores, members, losses) == pytest.approx([1, -0.5])


def test_lds_has_the_sign_of_traks_and_d_traks_own_evaluations() -> None:
    rng = np.random.default_rng(0)
    scores, members = rng.normal(size=(5, 40)), evaluate.random_subsets(40, 16)
    losses = rng.normal(size=(16, 5)) - members @ scores.T / 3
    ours = evaluate.lds(scores, members, losses)
    trak = [spearmanr((members @ scores.T)[:, q], -losses[:, q]).statistic for q in range(5)]
    d_trak = [spearmanr((members @ -scores.T)[:, q], losses[:, q]).statistic for q in range(5)]
    assert ours == pytest.approx(trak)
    assert ours == pytest.approx(d_trak)
    assert ours.mean() > 0.5


@given(st.integers(0, 1000))
def test_lds_is_one_where_scores_add_up_to_what_retraining_gives(seed: int) -> None:
    rng = np.random.default_rng(seed)
    scores, members = rng.normal(size=(3, 20)), evaluate.random_subsets(20, 8, seed=seed)
    assert evaluate.lds(scores, members, -np.exp(members @ scores.T)) == pytest.approx(np.ones(3))


def test_the_interval_of_lds_is_as_wide_as_other_queries_and_subsets_make_it() -> None:
    rng, found = np.random.default_rng(0), []
    for seed in range(60):
        responsible, members = rng.normal(size=(30, 80)), evaluate.random_subsets(80, 20, seed=seed)
        luck = 6 * rng.normal(size=(20, 30)) + 4 * rng.normal(size=(20, 1))  # of a training, some of it for all queries
        found.append(
            evaluate.lds_mean(responsible + rng.normal(size=(30, 80)), members, luck - members @ responsible.T)
        )
    reach = [(one.high - one.low) / (2 * 1.96) for one in found]
    assert np.mean(reach) == pytest.approx(np.std([one.value for one in found]), rel=0.2)


@given(st.integers(0, 1000))
def test_the_variance_of_a_mean_over_rows_and_columns_is_that_of_the_two_way_layout(seed: int) -> None:
    table = np.random.default_rng(seed).normal(size=(5, 4))
    rows, columns = table - table.mean(0), table - table.mean(1, keepdims=True)
    rest = columns - columns.mean(0)
    squares = [4 * table.mean(1).var(ddof=1), 5 * table.mean(0).var(ddof=1), (rest**2).sum() / 12]
    expected = max(squares[0] + squares[1] - squares[2], squares[2]) / 20
    interval = evaluate.intervals.two_way(table.mean(), table)
    assert ((interval.high - interval.value) / 1.959964) ** 2 == pytest.approx(expected)
    alone = evaluate.intervals.two_way(rows[:, 0].mean(), rows[:, :1])
    assert ((alone.high - alone.value) / 1.959964) ** 2 == pytest.approx(rows[:, 0].var(ddof=1) / 5)


def test_lds_takes_sums_that_differ_by_rounding_alone_as_tied() -> None:
    rng, members = np.random.default_rng(0), evaluate.random_subsets(400, 24)
    losses, tens = rng.normal(size=(24, 5)), rng.integers(1, 4, (5, 400))
    assert np.isnan(evaluate.lds(np.full((5, 400), 1 / 3), members, losses)).all()
    np.testing.assert_array_equal(evaluate.lds(tens / 10, members, losses), evaluate.lds(tens, members, losses))


def test_lds_says_which_shapes_do_not_fit() -> None:
    with pytest.raises(ValueError, match=r"do not fit together: \(2, 4\), \(3, 5\), \(3, 2\)"):
        evaluate.lds(np.zeros((2, 4)), np.zeros((3, 5)), np.zeros((3, 2)))
    with pytest.raises(ValueError, match="3 subsets and losses of 4"):
        evaluate.lds(np.zeros((2, 4)), np.zeros((3, 4)), np.zeros((4, 2)))


def test_lds_refuses_nan_which_would_leave_queries_out_of_the_mean() -> None:
    scores, members, losses = np.zeros((2, 4)), evaluate.random_subsets(4, 3), np.zeros((3, 2))
    scores[1, 2] = np.nan
    with pytest.raises(ValueError, match=r"scores hold NaN or inf, first at \(1, 2\)"):
        evaluate.lds_mean(scores, members, losses)
    losses[2, 0] = np.inf
    with pytest.raises(ValueError, match=r"losses hold NaN or inf, first at \(2, 0\)"):
        evaluate.lds(np.zeros((2, 4)), members, losses)


def test_random_subsets_have_half_the_samples_each() -> None:
    members = evaluate.random_subsets(11, 200)
    assert (members.sum(1) == 5).all()
    assert np.abs(members.mean(0) - 5 / 11).max() < 0.15
    with pytest.raises(ValueError, match="between 1 and 10, got size=11"):
        evaluate.random_subsets(11, 2, size=11)


# A model is the mean of its samples' values plus the seed; a query's loss is its squared distance from that.
VALUES = np.arange(8.0)
QUERIES = np.array([0.0, 7.0])


def train(folder: Path, ids: Any, seed: int) -> float:
    with open(folder / "trained", "a") as log:
        log.write(f"{ids.tolist()}\n")
    if (folder / "fails").exists() and 7 in ids:
        raise RuntimeError("out of memory")
    return float(VALUES[ids].mean() + seed)


def measure(model: float) -> Any:
    return (QUERIES - model) ** 2


SUBSETS = [np.array([0, 1]), np.array([2, 7]), np.array([4, 5])]
EXPECTED = [[0.5**2, 6.5**2], [4.5**2, 2.5**2], [4.5**2, 2.5**2]]


def test_retraining_continues_where_it_stopped(tmp_path: Path) -> None:
    run = functools.partial(train, tmp_path)
    (tmp_path / "fails").touch()
    with pytest.raises(rs.FailedTasksError, match=r"1 task failed, all others are done(.|\n)*out of memory"):
        evaluate.retrain(SUBSETS, run, measure, tmp_path / "out", progress=False)
    (tmp_path / "fails").unlink()
    losses = evaluate.retrain(SUBSETS, run, measure, tmp_path / "out", progress=False)
    again = evaluate.retrain(SUBSETS, run, measure, tmp_path / "out", progress=False)
    np.testing.assert_array_equal(losses, EXPECTED)
    np.testing.assert_array_equal(again, EXPECTED)
    assert (tmp_path / "trained").read_text().splitlines() == ["[0, 1]", "[2, 7]", "[4, 5]", "[2, 7]"]


def test_retraining_with_another_seed_or_key_is_another_result(tmp_path: Path) -> None:
    run = functools.partial(train, tmp_path)
    first = evaluate.retrain(SUBSETS[:1], run, measure, tmp_path / "out", progress=False)
    other = evaluate.retrain(SUBSETS[:1], run, measure, tmp_path / "out", seed=1, progress=False)
    asked = evaluate.retrain(SUBSETS[:1], run, lambda model: [model], tmp_path / "out", key="mean", progress=False)
    assert first.tolist() == [[0.5**2, 6.5**2]]
    assert other.tolist() == [[1.5**2, 5.5**2]]
    assert asked.tolist() == [[0.5]]


def test_retraining_on_workers_gives_the_same(tmp_path: Path) -> None:
    with Client(n_workers=1, threads_per_worker=2, processes=False, dashboard_address=":0") as client:
        run = functools.partial(train, tmp_path)
        losses = evaluate.retrain(SUBSETS, run, measure, tmp_path / "out", client=client, progress=False)
    np.testing.assert_array_equal(losses, EXPECTED)


def test_retraining_refuses_what_is_no_loss_per_query(tmp_path: Path) -> None:
    run = functools.partial(train, tmp_path)
    with pytest.raises(ValueError, match=r"shape \(2,\) with NaN or inf"):
        evaluate.retrain(SUBSETS, run, lambda model: [np.nan, 1], tmp_path / "out", progress=False)
    with pytest.raises(ValueError, match="subset 1 has no samples"):
        evaluate.retrain([SUBSETS[0], np.array([], int)], run, measure, tmp_path / "out", progress=False)
    evaluate.retrain(SUBSETS[:1], run, lambda model: [1], tmp_path / "out", progress=False)
    with pytest.raises(ValueError, match="losses of 2 queries for subset 1, but of 1 for subset 0"):
        evaluate.retrain(SUBSETS, run, measure, tmp_path / "out", progress=False)


def test_counterfactual_is_the_loss_without_a_querys_own_samples_minus_the_loss_with_all(tmp_path: Path) -> None:
    removed = np.array([[0, 1], [6, 7]])
    change = evaluate.counterfactual(
        removed, np.arange(8), functools.partial(train, tmp_path), measure, tmp_path / "out", progress=False
    )
    assert change == pytest.approx([4.5**2 - 3.5**2, (7 - 2.5) ** 2 - 3.5**2])
    with pytest.raises(ValueError, match="removed names 9, which is no training sample"):
        evaluate.counterfactual(np.array([[0, 9]]), np.arange(8), lambda *_: 0, measure, tmp_path / "out")
    with pytest.raises(ValueError, match="2 losses for 3 queries"):
        evaluate.counterfactual(
            np.array([[0], [1], [2]]), np.arange(8), functools.partial(train, tmp_path), measure, tmp_path / "out"
        )
