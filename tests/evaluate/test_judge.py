"""Judging scores by ground truths: metrics against brute force and SciPy, files, the command."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import spearmanr

from retrac_scale import evaluate
from retrac_scale.evaluate.judging import ranking
from retrac_scale.evaluate.judging.base import FOLDER, write_truth
from retrac_scale.evaluate.spearman import Columns, correlation, pseudo_values

KINDS = {"held out": 3, "generated": 2}
N = 12


def subsets_truth(m: int = 10, seeds: int = 2) -> evaluate.Subsets:
    rng = np.random.default_rng(0)
    members = evaluate.random_subsets(N, m)
    losses, again = rng.normal(size=(m, 5)), rng.normal(size=(seeds, 4, 5))
    return evaluate.Subsets("tiny-lds", KINDS, N, {"seeds": [0]}, members, losses, again)


def groups_truth() -> evaluate.Groups:
    rng = np.random.default_rng(1)
    labels = {"colour": np.array(["a", "b", "c", "d"] * 3), "size": np.array(["s", "l"] * 6)}
    names = {"colour": np.array(["a", "b", "c", "d"]), "size": np.array(["l", "s"])}
    without = {column: rng.normal(size=(2, len(found), 5)) for column, found in names.items()}
    return evaluate.Groups("tiny-groups", KINDS, N, {}, labels, names, without, rng.normal(size=(2, 5)))


def wanted_truth(*metrics: str) -> evaluate.Wanted:
    parts = np.zeros((5, N), np.int8)
    parts[0, 3] = parts[1, 5] = parts[3, [1, 2]] = parts[4, 7] = 1
    parts[3, 4] = 2  # query 2 is sought nothing
    return evaluate.Wanted("tiny-copies", KINDS, N, {}, parts, metrics or ("first", "MRR"))


TRUTHS: list[evaluate.Truth] = [subsets_truth(), groups_truth(), wanted_truth()]


@pytest.fixture
def scores() -> Any:
    return np.random.default_rng(2).normal(size=(5, N))


@given(st.integers(0, 10_000), st.integers(1, 9))
def test_ranks_of_a_resample_are_those_of_scipy_with_ties(seed: int, levels: int) -> None:
    rng = np.random.default_rng(seed)
    a, b = rng.integers(0, levels + 1, (9, 4)).astype(float), rng.integers(0, 4, (9, 4)).astype(float)
    rows = rng.integers(0, 9, 9)
    found = correlation(Columns.of(a), Columns.of(b), np.bincount(rows, minlength=9))
    for column in range(4):
        x, y = a[rows, column], b[rows, column]
        if np.ptp(x) and np.ptp(y):
            assert found[column] == pytest.approx(spearmanr(x, y).statistic, abs=1e-12)
        else:
            assert np.isnan(found[column])


def test_pseudo_values_are_those_of_scipys_correlation_without_a_row() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 6, (9, 4)).astype(float), rng.normal(size=(9, 4))
    found = pseudo_values(Columns.of(a), Columns.of(b))
    for row, column in np.ndindex(9, 4):
        x, y = a[:, column], b[:, column]
        without = spearmanr(np.delete(x, row), np.delete(y, row)).statistic
        assert found[row, column] == pytest.approx(9 * spearmanr(x, y).statistic - 8 * without, abs=1e-12)


def test_lds_is_scipys_correlation_with_the_interval_of_lds_mean(scores: Any) -> None:
    truth = subsets_truth()
    judged = evaluate.judge(scores, truth, draws=200, seed=3)
    for kind, rows in (("held out", slice(0, 3)), ("generated", slice(3, 5))):
        sums = truth.members @ scores[rows].T
        by_scipy = [spearmanr(x, -y).statistic for x, y in zip(sums.T, truth.losses[:, rows].T, strict=True)]
        assert judged["LDS", kind].value.value == pytest.approx(np.mean(by_scipy))
        whole = evaluate.lds_mean(scores[rows], truth.members, truth.losses[:, rows])
        value = judged["LDS", kind].value
        assert (value.low, value.high) == pytest.approx((whole.low, whole.high))
        assert judged["LDS", kind].count == KINDS[kind]


@pytest.mark.parametrize("luck", [0.3, 1.0])
def test_the_ceiling_is_what_a_perfect_predictor_reaches_though_few_subsets_are_trained_again(luck: float) -> None:
    rng = np.random.default_rng(0)
    reached, ceilings, held = [], [], []
    for seed in range(60):
        responsible, members = rng.normal(size=(100, 64)), evaluate.random_subsets(64, 64, seed=seed)
        mean = -(members @ responsible.T)
        losses = mean + luck * mean.std(0) * rng.normal(size=(3, *mean.shape))
        truth = evaluate.Subsets("tiny-lds", {"held out": 100}, 64, {}, members, losses[0], losses[1:, :8])
        (figure,) = evaluate.judge(responsible, truth, draws=1).figures
        assert figure.ceiling is not None
        reached.append(figure.value.value)
        ceilings.append(figure.ceiling.value)
        held.append(figure.ceiling.low <= 1 / np.sqrt(1 + luck**2) <= figure.ceiling.high)
    assert np.mean(ceilings) == pytest.approx(1 / np.sqrt(1 + luck**2), abs=0.01)  # Pearson's correlation
    assert np.mean(reached) == pytest.approx(np.mean(ceilings), abs=0.03)  # Spearman's is a little lower
    assert np.mean(held) >= 0.85


def test_without_further_seeds_there_is_no_ceiling(scores: Any) -> None:
    truth = subsets_truth(seeds=0)
    assert all(figure.ceiling is None for figure in evaluate.judge(scores, truth, draws=5).figures)


def brute_metrics(row: Any, parts: Any) -> dict[str, float]:
    order = sorted(range(len(row)), key=lambda i: (-row[i], parts[i] > 0))
    found = [int(parts[i]) for i in order]
    count = sum(part > 0 for part in found)
    place = next(i for i, part in enumerate(found) if part)
    return {
        "first": float(found[0] > 0),
        "MRR": 1 / (1 + place),
        "precision@10": sum(part > 0 for part in found[:10]) / 10,
        "recall at count": sum(part > 0 for part in found[:count]) / count,
        "in top 10": float({part for part in found if part} <= set(found[:10])),
    }


@given(st.integers(0, 10_000))
def test_metrics_of_ranking_equal_a_walk_down_the_list(seed: int) -> None:
    rng = np.random.default_rng(seed)
    parts = rng.integers(0, 3, (5, N)).astype(np.int8) * (rng.random((5, N)) < 0.4)
    parts[:, 0] = 1
    scores = rng.integers(0, 6, (5, N)).astype(float)
    names = ("first", "MRR", "precision@10", "recall at count", "in top 10")
    judged = evaluate.judge(scores, evaluate.Wanted("tiny-x", KINDS, N, {}, parts, names), draws=5)
    for kind, rows in (("held out", range(3)), ("generated", range(3, 5))):
        expected = [brute_metrics(scores[row], parts[row]) for row in rows]
        for name in names:
            assert judged[name, kind].value.value == pytest.approx(np.mean([one[name] for one in expected]))


def test_a_query_without_anything_to_find_is_left_out(scores: Any) -> None:
    judged = evaluate.judge(scores, wanted_truth(), draws=5)
    assert (judged["first", "held out"].count, judged["first", "generated"].count) == (2, 2)


def test_equal_scores_find_nothing() -> None:
    judged = evaluate.judge(np.ones((5, N)), wanted_truth(), draws=5)
    assert judged["first", "held out"].value.value == 0
    assert judged["MRR", "held out"].value.value == pytest.approx(1 / N)
    assert "5 of 5 queries have the same score for every sample" in str(judged)


def test_the_ceiling_of_precision_is_what_there_is_to_find() -> None:
    truth = wanted_truth("precision@10")
    judged = evaluate.judge((truth.parts > 0).astype(float), truth, draws=5)
    for figure in judged.figures:
        assert figure.ceiling is not None
        assert figure.value.value == figure.ceiling.value
    assert judged["precision@10", "generated"].value.value == pytest.approx((0.3 + 0.1) / 2)


def test_groups_are_ordered_by_summed_scores_and_judged_by_harm(scores: Any) -> None:
    truth = groups_truth()
    judged = evaluate.judge(scores, truth, draws=5)
    harm = (truth.without["colour"] - truth.whole[:, None]).mean(0)  # [g, q]
    first, gain = [], []
    for query in range(3):
        sums = [scores[query, truth.labels["colour"] == name].sum() for name in "abcd"]
        first.append(float(np.argmax(sums) == np.argmax(harm[:, query])))
        gains = np.clip(harm[:, query], 0, None)
        told = sum(gains[g] / np.log2(2 + place) for place, g in enumerate(np.argsort(sums)[::-1][:3]))
        gain.append(told / sum(g / np.log2(2 + place) for place, g in enumerate(sorted(gains)[::-1][:3])))
    assert judged["first of 4, colour", "held out"].value.value == pytest.approx(np.mean(first))
    assert judged["NDCG@3 of 4, colour", "held out"].value.value == pytest.approx(np.mean(gain))


def test_the_ceiling_of_groups_is_one_seed_judged_by_the_other() -> None:
    truth = groups_truth()
    one, other = truth.harm("size")[:, :3]
    same = np.mean(one.argmax(1) == other.argmax(1))
    ceiling = evaluate.judge(np.zeros((5, N)), truth, draws=5)["first of 2, size", "held out"].ceiling
    assert ceiling is not None
    assert ceiling.value == pytest.approx(same)
    without = {column: values[:1] for column, values in truth.without.items()}
    alone = replace(truth, without=without, whole=truth.whole[:1])
    assert {figure.ceiling for figure in evaluate.judge(np.zeros((5, N)), alone, draws=5).figures} == {None}


def test_where_no_removal_harms_a_query_there_is_no_ndcg() -> None:
    truth = groups_truth()
    harmless = replace(truth, whole=truth.whole + 10)
    metrics = {figure.metric for figure in evaluate.judge(np.ones((5, N)), harmless, draws=5).figures}
    assert metrics == {"first of 4, colour", "first of 2, size"}


def test_ndcg_of_gains_in_falling_order_is_one_and_without_gains_undefined() -> None:
    assert ranking.ndcg(np.array([[3.0, 1, 0, -2]]), 3).tolist() == [1]
    assert np.isnan(ranking.ndcg(np.array([[-1.0, -2]]), 3)).all()


@pytest.mark.parametrize("truth", TRUTHS, ids=lambda truth: truth.what)
def test_a_truth_comes_back_from_its_file(truth: evaluate.Truth, scores: Any, tmp_path: Path) -> None:
    write_truth(truth, tmp_path)
    again = evaluate.truth(truth.name, tmp_path)
    assert (again.name, again.kinds, again.samples, again.about) == (truth.name, truth.kinds, N, truth.about)
    first, second = (evaluate.judge(scores, one, draws=20) for one in (truth, again))
    for a, b in zip(first.figures, second.figures, strict=True):
        assert a.value.value == pytest.approx(b.value.value, abs=1e-6)
    assert evaluate.truths(tmp_path) == [truth.name]


@pytest.mark.parametrize("truth", TRUTHS, ids=lambda truth: truth.what)
def test_a_truth_of_one_kind_of_query_judges_it_as_the_whole_truth_does(truth: evaluate.Truth, scores: Any) -> None:
    whole = evaluate.judge(scores, truth, draws=20)
    some = evaluate.judge(scores[3:], truth.some(["generated"]), draws=20)
    assert some.figures == tuple(figure for figure in whole.figures if figure.queries == "generated")


def test_scores_may_come_as_a_file_or_by_kind_of_query(scores: Any, tmp_path: Path) -> None:
    truth = subsets_truth()
    np.save(tmp_path / "scores.npy", scores)
    by_kind = {"generated": scores[3:], "held out": scores[:3], "of no truth": np.zeros((9, 9))}
    expected = evaluate.judge(scores, truth, draws=5)
    assert evaluate.judge(tmp_path / "scores.npy", truth, draws=5) == expected
    assert evaluate.judge(by_kind, truth, draws=5) == expected


BAD: dict[str, tuple[Any, str]] = {
    "transposed": (np.zeros((N, 5)), r"\(12, 5\), expected \(5, 12\): transposed\? Give scores.T"),
    "shape": (np.zeros((5, 11)), r"\(5, 11\), expected \(5, 12\): a row for each query"),
    "complex": (np.zeros((5, N), complex), "complex128, expected real numbers"),
    "text": (np.full((5, N), "1"), "<U1, expected real numbers"),
    "missing": ({"held out": np.zeros((3, N))}, "'generated' is missing"),
    "kind": ({"held out": np.zeros((2, N)), "generated": np.zeros((2, N))}, r"tiny-lds, held out are \(2, 12\)"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_scores_is_refused(name: str) -> None:
    given, said = BAD[name]
    with pytest.raises(ValueError, match=said):
        evaluate.judge(given, subsets_truth())


@pytest.mark.parametrize("ends", [{"draws": 0}, {"level": 1.0}])
def test_intervals_without_resamples_or_of_everything_are_refused(ends: Any, scores: Any) -> None:
    with pytest.raises(ValueError, match="at least 1 resample and a level between 0 and 1"):
        evaluate.judge(scores, subsets_truth(), **ends)


def test_a_score_that_is_no_number_is_named(scores: Any) -> None:
    scores[3, 7] = np.nan
    with pytest.raises(ValueError, match="hold 1 NaN or inf, first for query 3, sample 7"):
        evaluate.judge(scores, subsets_truth())


def test_a_file_that_holds_no_array_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text.npy").write_text("1 2 3")
    np.savez(tmp_path / "several.npz", a=np.zeros(3))
    np.save(tmp_path / "objects.npy", np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(FileNotFoundError, match=r"give a \.npy file"):
        evaluate.judge(tmp_path / "none.npy", subsets_truth())
    with pytest.raises(ValueError, match="holds several arrays"):
        evaluate.judge(tmp_path / "several.npz", subsets_truth())
    for name in ("text.npy", "objects.npy"):
        with pytest.raises(ValueError, match="no array of numbers"):
            evaluate.judge(tmp_path / name, subsets_truth())


def test_a_truth_that_is_not_there_and_a_figure_that_is_not_are_answered_with_those_that_are(scores: Any) -> None:
    with pytest.raises(ValueError, match=r"no truth 'digits8-lsd'; did you mean 'digits8-lds'\? There are: "):
        evaluate.judge(scores, "digits8-lsd")
    with pytest.raises(KeyError, match="LDS, held out; LDS, generated"):
        evaluate.judge(scores, subsets_truth(), draws=5)["LDS", "training"]


def test_the_sign_is_asked_for_where_every_score_seems_turned() -> None:
    rng = np.random.default_rng(0)
    responsible, members = rng.normal(size=(5, N)), evaluate.random_subsets(N, 40)
    truth = evaluate.Subsets("tiny-lds", KINDS, N, {}, members, -(members @ responsible.T), np.zeros((0, 0, 5)))
    assert not evaluate.judge(responsible, truth, draws=20).notes
    assert "is the sign turned" in evaluate.judge(-responsible, truth, draws=20).notes[0]


@pytest.mark.parametrize("name", evaluate.truths())
def test_a_truth_of_the_package_is_small_and_judges_what_it_holds(name: str) -> None:
    truth = evaluate.truth(name)
    assert (FOLDER / f"{name}.npz").stat().st_size < 1_000_000
    assert {"data", "queries", "code", "training", "versions"} <= set(truth.about)
    assert ("model" in truth.about) == ("generated" in truth.kinds)
    if isinstance(truth, evaluate.Wanted):
        for figure in evaluate.judge(truth.parts > 0, truth, draws=5).figures:
            best = 1 if figure.ceiling is None else figure.ceiling.value
            assert figure.value.value == best or figure.metric == "in top 10"
    else:
        random = np.random.default_rng(0).normal(size=truth.shape)
        assert all(-1 <= figure.value.value <= 1 for figure in evaluate.judge(random, truth, draws=5).figures)
    if isinstance(truth, evaluate.Subsets):
        assert (truth.members.sum(1) == truth.samples // 2).all()
        members = evaluate.random_subsets(truth.samples, len(truth.members))
        assert (truth.members == members).all()  # anyone can draw them anew


def run(*words: str, folder: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-X", "importtime", "-m", "retrac_scale.cli", *words]
    return subprocess.run(command, cwd=folder, env=environment, text=True, capture_output=True, check=False)


def test_a_file_becomes_a_judged_row_in_one_command_without_torch(tmp_path: Path) -> None:
    np.save(tmp_path / "scores.npy", np.random.default_rng(0).normal(size=(192, 512)))
    before = os.times().children_user
    done = run("judge", "scores.npy", "--truth", "digits8-lds", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert os.times().children_user - before < 10
    assert {line.rsplit("|", 1)[-1].strip() for line in done.stderr.splitlines()}.isdisjoint({"torch", "zarr", "dask"})
    header, columns, *lines = done.stdout.splitlines()
    assert header.startswith("digits8-lds: 64 models trained on random subsets")
    assert columns.split() == ["queries", "count", "metric", "value", "ceiling"]
    assert [line.split("  ")[0] for line in lines] == ["held out", "training", "generated"]


def test_the_command_lists_truths_and_says_in_one_line_what_is_wrong(tmp_path: Path, capsys: Any) -> None:
    from retrac_scale.cli import main

    assert main(["judge", "--list", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)["truths"]
    assert [one["name"] for one in listed] == evaluate.truths()
    assert main(["judge", "--list"]) == 0
    assert "digits8-lds" in capsys.readouterr().out
    assert main(["judge", str(tmp_path / "none.npy"), "--truth", "digits8-lds"]) == 1
    assert "there is no" in capsys.readouterr().err
    assert main(["judge"]) == 1
    assert "--list" in capsys.readouterr().err
    np.save(tmp_path / "s.npy", np.random.default_rng(0).normal(size=(192, 512)))
    assert main(["judge", str(tmp_path / "s.npy"), "--truth", "digits8-lds", "--draws", "10", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["figures"][0]["metric"] == "LDS"
