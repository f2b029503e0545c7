"""The yardstick's foreign methods are what their authors publish, and its command judges without tuning."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from scipy.stats import spearmanr
from trak.score_computers import BasicScoreComputer

import retrac_scale as rs
from benchmarks import removal, yardstick, yardstick_page
from benchmarks.yardstick_baselines import baselines, contrastive, forward, inner, pixels, sanity, shuffled
from benchmarks.yardstick_foreign import (
    by_place,
    foreign,
    loaded,
    script_errors,
    script_features,
    trak_package,
)
from benchmarks.yardstick_lab import Lab, damped, digest
from benchmarks.yardstick_methods import DAMPINGS, FORMS, Found, Method, estimated, fitted, ours
from retrac_scale import evaluate
from retrac_scale.estimators.ridge import AUTO
from retrac_scale.evaluate.settings import Images
from retrac_scale.evaluate.settings.removal import Removal
from retrac_scale.projections import Identity
from tests.conftest import tiny_unet

N, Q, K = 40, 6, 12
SCHEDULER: Any = DDPMScheduler(num_train_timesteps=1000)


@pytest.fixture
def lab(tmp_path: Path) -> Lab:
    """A tiny U-Net, 12 images, two kinds of two queries."""
    random = torch.Generator().manual_seed(3)
    train, held_out, other = (torch.randn(n, 1, 8, 8, generator=random) for n in (12, 2, 2))
    queries = {"held out": Images(held_out, "held-out"), "generated": Images(other, "generated")}
    weights = {name: value.clone() for name, value in tiny_unet(1).state_dict().items()}
    return Lab(Images(train), queries, tiny_unet, SCHEDULER, {"epoch-1": weights}, tmp_path / "record", tmp_path)


def arrays(n: int = N) -> tuple[Any, Any]:
    rng = np.random.default_rng(0)
    return rng.standard_normal((n, K)), rng.standard_normal((Q, K))


@pytest.mark.parametrize("n", [8, N])
def test_d_traks_scores_are_its_notebooks_formula(n: int) -> None:
    train, queries = arrays(n)
    found = damped(train, queries, DAMPINGS)
    for damping, scores in zip(DAMPINGS, found, strict=True):
        penalty = damping * np.trace(train.T @ train) / min(n, K)
        kernel = np.linalg.inv(train.T @ train + penalty * np.eye(K))
        np.testing.assert_allclose(scores, queries @ (train @ kernel).T, rtol=1e-6, atol=1e-8)


def test_das_of_directions_is_its_authors_script() -> None:
    """Published: queries and kernel of mean directions, errors divided by their length over timesteps, squares."""
    rng = np.random.default_rng(1)
    gradients, asked = rng.standard_normal((N, 5, K)), rng.standard_normal((Q, 5, K))
    losses = rng.uniform(0.1, 2, (N, 5))
    train, queries = ((g / np.linalg.norm(g, axis=2, keepdims=True)).mean(1) for g in (gradients, asked))
    roots = np.sqrt(losses)
    errors = (roots / np.linalg.norm(roots, axis=1, keepdims=True)).mean(1)
    penalty = 0.1 * np.trace(train.T @ train) / K
    published = (queries @ np.linalg.inv(train.T @ train + penalty * np.eye(K)) @ train.T * errors) ** 2
    np.testing.assert_allclose(damped(train, queries, [0.1], errors)[0] ** 2, published, rtol=1e-9)
    mean = {"c": losses.mean(1, keepdims=True)}
    norms = {"c": np.ones((N, 1))}
    store = rs.write_store(None, {"c": train[:, None]}, losses=mean, norms=norms, dtype="float32")
    ask = rs.write_store(None, {"c": queries[:, None]}, dtype="float32")
    estimator = rs.DAS(0.1)
    scores = rs.build_index(store, estimator, None, dtype="float32").scores(ask).compute()
    np.testing.assert_allclose(scores * errors**2, published, rtol=1e-4, atol=1e-6 * published.max())


def test_traks_package_agrees_on_the_same_gradients() -> None:
    """Its inverse is computed in float32, and divided by the mean of its absolute entries."""
    train, queries = arrays()
    penalty = 0.5 * np.trace(train.T @ train) / K
    computer = BasicScoreComputer(torch.float64, torch.device("cpu"), logging_level=logging.ERROR, lambda_reg=penalty)
    gradients = torch.from_numpy(train)
    features = computer.get_x_xtx_inv(gradients, computer.get_xtx(gradients))
    theirs = torch.zeros(N, Q, dtype=torch.float64)
    computer.get_scores(features, torch.from_numpy(queries), theirs)
    scale = np.abs(np.linalg.inv(train.T @ train + penalty * np.eye(K))).mean()
    ours = damped(train, queries, [0.5])[0]
    np.testing.assert_allclose(theirs.numpy().T * scale, ours, rtol=1e-5, atol=1e-6 * np.abs(ours).max())
    store, ask = (rs.write_store(None, {"c": x[:, None]}, dtype="float32") for x in (train, queries))
    index = rs.build_index(store, rs.TRAK(0.5), None, dtype="float32")
    np.testing.assert_allclose(index.scores(ask).compute(), ours, rtol=1e-4, atol=1e-5 * np.abs(ours).max())


@pytest.mark.slow
@pytest.mark.parametrize(("measure", "unit"), [("mean_squared_output", False), ("mean_output", True)])
def test_script_features_are_means_of_plain_gradients_under_noise_by_place(lab: Lab, measure: str, unit: bool) -> None:
    found = script_features(lab, lab.train, measure=measure, batch=5, projection=Identity(), unit=unit)
    model = tiny_unet()
    model.load_state_dict(lab.checkpoints["epoch-1"])
    for row in (0, 7):
        total: Any = 0.0
        for timestep in range(0, 1000, 100):
            torch.manual_seed(timestep)
            noise = torch.randn_like(lab.train.images[:5])[row % 5][None]
            steps = torch.tensor([timestep])
            output = model(SCHEDULER.add_noise(lab.train.images[row][None], noise, steps), steps).sample
            value = output.square().mean() if measure == "mean_squared_output" else output.mean()
            gradient = torch.cat([g.flatten() for g in torch.autograd.grad(value, list(model.parameters()))]).double()
            total = total + (gradient / gradient.norm() if unit else gradient) / 10
        assert float((torch.from_numpy(found[row]) - total).norm() / total.norm()) < 1e-4


def test_noise_by_place_is_seeded_anew_for_every_batch() -> None:
    torch.manual_seed(300)
    drawn = torch.randn(4, 2, 3, 3)
    np.testing.assert_array_equal(by_place((2, 3, 3), 10, 300, 4), drawn[[0, 1, 2, 3, 0, 1, 2, 3, 0, 1]])


def test_errors_are_those_of_the_script(lab: Lab) -> None:
    model = tiny_unet().eval()
    model.load_state_dict(lab.checkpoints["epoch-1"])
    found, row, squared = script_errors(lab, timesteps=4, batch=5), 6, []
    for timestep in (0, 250, 500, 750):
        torch.manual_seed(timestep)
        noise = torch.randn(5, 1, 8, 8)[row % 5][None]
        steps = torch.tensor([timestep])
        with torch.no_grad():
            predicted = model(SCHEDULER.add_noise(lab.train.images[row][None], noise, steps), steps).sample
        squared.append(float((predicted - noise).square().mean()))
    roots = np.sqrt(squared)
    assert found[row] == pytest.approx((roots / np.linalg.norm(roots)).mean(), rel=1e-5)


def test_packages_are_given_the_pairs_of_our_own_store(lab: Lab) -> None:
    store = rs.sketch(
        lab.task(),
        lab.train,
        None,
        checkpoints=lab.last,
        timesteps=rs.EvenlySpaced(10, noise="own"),
        projection=rs.CountSketch(64),
        dtype="float32",
        progress=False,
    )
    queries = rs.sketch(
        lab.task(),
        lab.queries["held out"],
        None,
        checkpoints=lab.last,
        timesteps=rs.EvenlySpaced(10, noise="own"),
        like=store,
        dtype="float32",
        progress=False,
    )
    _, steps, noise = loaded(lab, lab.train, 0)
    assert (steps.numpy() == store.timesteps("epoch-1")).all()
    assert noise.shape == (12, 10, 1, 8, 8)
    mine = rs.build_index(store, rs.TRAK(0.5), None, dtype="float32").scores(queries).compute()
    theirs = trak_package(64, 0.5, lab).scores["held out"]
    assert np.corrcoef(mine.ravel(), theirs.ravel())[0, 1] > 0.9999


@pytest.mark.slow
def test_methods_of_a_forward_pass_or_common_noise_score_every_query(lab: Lab) -> None:
    assert len({method.name for method in ours() + foreign()}) >= 14
    assert len(baselines()) >= 5
    for method in (*ours(), *baselines(), *sanity()):
        if method.noise in ("common", "-") and "seed" not in method.name:
            found = method.ask(lab)
            for kind in lab.queries:
                assert found.scores[kind].shape == ((len(DAMPINGS), 2, 12) if method.fits else (2, 12)), method
                assert np.isfinite(found.scores[kind]).all(), method


def test_baselines_are_what_they_say(lab: Lab) -> None:
    x, y = (lab.train.images.flatten(1).double().numpy(), lab.queries["held out"].images.flatten(1).double().numpy())
    np.testing.assert_allclose(pixels(inner, lab).scores["held out"], y @ x.T)
    found = {method.name: method for method in baselines()}
    centred = found["pixels, centred cosine"].ask(lab).scores["held out"]
    a, b = y - x.mean(0), x - x.mean(0)
    expected = a @ b.T / np.linalg.norm(a, axis=1)[:, None] / np.linalg.norm(b, axis=1)
    np.testing.assert_allclose(centred, expected, rtol=1e-9)
    solved = found["pixel ridge"].ask(lab).scores["held out"]
    penalty = 0.5 * np.trace(x @ x.T) / 12
    np.testing.assert_allclose(solved, y @ np.linalg.inv(x.T @ x + penalty * np.eye(64)) @ x.T, rtol=1e-3, atol=1e-5)
    np.testing.assert_array_equal(
        contrastive(inner, lab).scores["held out"], contrastive(inner, lab).scores["held out"]
    )
    assert forward("outputs", lab).bytes == 4 * 64


def test_the_recipe_at_all_dampings_is_its_index_at_the_one_by_rule(lab: Lab) -> None:
    indexed = estimated("common 4 x 512", rs.ReTracRidge(), lab).scores["held out"]
    found = fitted("common 4 x 512", True, False, lab).scores["held out"][DAMPINGS.index(AUTO)]
    assert np.corrcoef(indexed.ravel(), found.ravel())[0, 1] > 0.999  # the index keeps int8


def test_shuffled_scores_are_the_recipes_in_another_order(lab: Lab) -> None:
    recipe = estimated("common 4 x 512", rs.ReTracRidge(), lab).scores["held out"]
    mixed = shuffled(1, lab).scores["held out"]
    assert (mixed != recipe).any()
    np.testing.assert_array_equal(np.sort(mixed, axis=1), np.sort(recipe, axis=1))


def subsets(q: int = 4, m: int = 12) -> evaluate.Subsets:
    rng = np.random.default_rng(2)
    members = evaluate.random_subsets(N, m, seed=0)
    return evaluate.Subsets(
        "tiny-lds",
        {"held out": q, "generated": q},
        N,
        {},
        members,
        rng.standard_normal((m, 2 * q)),
        np.zeros((0, 0, 2 * q)),
    )


def test_a_fitted_damping_never_sees_the_subsets_that_judge_it() -> None:
    truth = subsets()
    rng = np.random.default_rng(5)
    scores = {kind: rng.standard_normal((len(DAMPINGS), 4, N)) for kind in truth.kinds}
    method = Method("some", "own", lambda _: Found({}, 0, 0, 0.0), fits=True)

    def at(known: evaluate.Subsets) -> Any:
        rule, row = yardstick.rows_of(method, scores, [known])
        assert not rule.half
        assert row.half
        return row

    row = at(truth)
    other = truth.losses.copy()
    other[1::2] = rng.standard_normal(other[1::2].shape)
    np.testing.assert_array_equal(at(replace(truth, losses=other)).scores["held out"], row.scores["held out"])
    means = [
        np.mean([spearmanr(truth.members[::2] @ one[q], -truth.losses[::2, q]).statistic for q in range(4)])
        for one in scores["held out"]
    ]
    np.testing.assert_array_equal(row.scores["held out"], scores["held out"][int(np.argmax(means))])
    (figure,) = [one for one in yardstick.judged(row, truth) if one["queries"] == "generated"]
    right = [
        spearmanr(truth.members[1::2] @ row.scores["generated"][q], -truth.losses[1::2, 4 + q]).statistic
        for q in range(4)
    ]
    assert figure["value"]["value"] == pytest.approx(np.mean(right))


def test_the_recipes_lead_is_the_difference_of_two_lds() -> None:
    truth, rng = subsets(), np.random.default_rng(6)
    one, other = ({kind: rng.standard_normal((4, N)) for kind in truth.kinds} for _ in range(2))
    found = yardstick.ahead(one, other, truth)["held out"]
    means = [evaluate.lds(x["held out"], truth.members, truth.losses[:, :4]).mean() for x in (one, other)]
    assert found["value"] == pytest.approx(means[0] - means[1])
    assert found["low"] < found["value"] < found["high"]
    assert yardstick.ahead(one, one, truth)["held out"] == {"value": 0, "low": 0, "high": 0}


def test_scores_are_kept_and_only_new_kinds_of_queries_are_computed(lab: Lab) -> None:
    calls: list[list[str]] = []

    def ask(asked: Lab) -> Found:
        calls.append(list(asked.queries))
        return Found({kind: np.ones((2, 12)) for kind in asked.queries if kind != "generated"}, 1, 2, 3.0)

    method = Method("some", "own", ask)
    scores, cost = yardstick.asked(method, lab.some(["held out"]))
    assert cost == {"pairs": 1, "bytes": 2, "seconds": 3.0, "machine": yardstick.machine()}
    again, _ = yardstick.asked(method, lab)
    assert calls == [["held out"], ["generated"]]
    assert list(again) == list(scores) == ["held out"]  # the method has none for generated ones
    other = replace(method, name="other")
    assert yardstick.asked(other, lab, kept=True) == ({}, {})
    moved = replace(lab, queries={**lab.queries, "held out": Images(lab.queries["generated"].images + 1)})
    assert yardstick.asked(method, moved, kept=True)[0] == {}
    yardstick.asked(method, lab)
    yardstick.asked(method, lab, again=True)
    assert calls[2:] == [["held out", "generated"]]


def test_queries_with_other_pixels_are_sketched_anew(lab: Lab) -> None:
    first = estimated("common 4 x 512", rs.ReTracRidge(), lab).scores["held out"]
    other = Images(lab.queries["held out"].images + 0.1, "held-out")
    assert digest(other) != digest(lab.queries["held out"])
    moved = replace(lab, queries={"held out": other})
    assert (estimated("common 4 x 512", rs.ReTracRidge(), moved).scores["held out"] != first).any()


@pytest.fixture
def report() -> dict[str, Any]:
    """Of three rows: the recipe, one clearly behind, one level with it."""

    def row(method: str, value: float, lead: tuple[float, float, float] | None) -> dict[str, Any]:
        figure = {
            "queries": "held out",
            "count": 4,
            "metric": "LDS",
            "ceiling": {"value": 0.9, "low": 0.8, "high": 0.95},
        }
        figure |= {"value": {"value": value, "low": value - 0.1, "high": value + 0.1}}
        keys = ("value", "low", "high")
        compared = {} if lead is None else {"ahead": {"held out": dict(zip(keys, lead, strict=True))}}
        return {
            **{"machine": "some", "method": method, "noise": "common", "group": "ours", "form": "", "half": False},
            **{"pairs": 4, "bytes": 2048, "seconds": 1.5, "figures": {"tiny-lds": [figure]}, **compared},
        }

    rows = [row("ReTracRidge", 0.6, None), row("TRAK", 0.3, (0.3, 0.2, 0.4)), row("DAS", 0.59, (0.01, -0.05, 0.07))]
    return {
        **{"command": "python", "date": "2026-01-01", "setting": "tiny", "samples": N},
        **{"recipe": "ReTracRidge", "truths": {"tiny-lds": "12 models"}, "rows": rows},
    }


def test_signed_squares_keep_signs_and_are_judged_where_scores_are_added_up() -> None:
    scores = {"held out": np.array([[-3.0, 0.5, 2.0]])}
    truth = evaluate.Wanted("tiny-names", {"held out": 1}, 3, {}, np.array([[0, 0, 1]], np.int8), ("first",))
    method = Method("some", "own", lambda _: Found({}, 0, 0, 0.0), forms=tuple(FORMS))
    rows = {row.form: row for row in yardstick.rows_of(method, scores, [truth])}
    made = {form: row.scores["held out"].tolist() for form, row in rows.items()}
    assert made == {"": [[-3, 0.5, 2]], "signed squares": [[-9, 0.25, 4]], "squared": [[9, 0.25, 4]]}
    firsts = {form: [one["value"]["value"] for one in yardstick.judged(row, truth)] for form, row in rows.items()}
    assert firsts == {
        "": [1],
        "signed squares": [],
        "squared": [0],
    }  # a list in the order of signed squares is the same


def test_the_page_names_the_rows_that_the_recipe_is_not_clear_of(report: dict[str, Any]) -> None:
    (line,) = yardstick_page.advice(report)
    assert (line["clearly better"], line["not clearly worse"]) == ("none", "DAS (common)")
    report["rows"][1]["ahead"]["held out"] = {"value": -0.2, "low": -0.3, "high": -0.1}
    report["rows"].pop()
    (line,) = yardstick_page.advice(report)
    assert (line["clearly better"], line["not clearly worse"]) == ("TRAK (common)", "none")


def test_the_pages_show_each_row_under_its_ceiling(report: dict[str, Any]) -> None:
    for page in (yardstick_page.setting_page(report), yardstick_page.leaderboard([report], [])):
        lines = [line for line in page.splitlines() if line.startswith("| ")]
        names = [line.split(" | ")[0].removeprefix("| ") for line in lines]
        start = names.index("*ceiling*")
        assert names[start - 2 : start + 4] == ["method", "---", "*ceiling*", "ReTracRidge", "DAS", "TRAK"]
        assert "0.9 [0.8, 0.95]" in lines[start]


def test_groups_stand_in_every_table_under_what_one_seed_says_of_another(report: dict[str, Any]) -> None:
    rng = np.random.default_rng(3)
    labels = {"digit": np.arange(N) % 4, "size": np.arange(N) % 2}
    names = {"digit": np.arange(4), "size": np.arange(2)}
    without = {column: rng.normal(size=(2, len(found), 8)) for column, found in names.items()}
    kinds = {"held out": 4, "generated": 4}
    truth = evaluate.Groups("tiny-groups", kinds, N, {}, labels, names, without, rng.normal(size=(2, 8)))
    method = Method("some", "own", lambda _: Found({}, 0, 0, 0.0))
    scores = {kind: rng.normal(size=(4, N)) for kind in kinds}
    for row, known in zip(report["rows"], (scores, scores, {"generated": scores["generated"]}), strict=True):
        row["figures"]["tiny-groups"] = yardstick.judged(yardstick.Row(method, "", known), truth)
    assert yardstick.judged(yardstick.Row(method, "", scores, half=True), truth) == []
    report["truths"]["tiny-groups"] = truth.sentence
    page = yardstick_page.leaderboard([report], []).split("### tiny-groups")[1]
    tables = [part.splitlines() for part in page.split("\n\n") if part.startswith("| method")]
    metrics = ["first of 4, digit", "NDCG@3 of 4, digit", "first of 2, size", "NDCG@3 of 2, size"]
    assert [one[0].split(" | ")[2] for one in tables] == [f"{metric}, held out" for metric in metrics]
    same = float(np.mean(truth.harm("digit")[0, :4].argmax(1) == truth.harm("digit")[1, :4].argmax(1)))
    assert [len(one) for one in tables] == [6] * 4
    assert tables[0][2].startswith(f"| *ceiling* |  | {same:.3g} [")
    assert sum("|  |" in line for line in tables[0][3:]) == 1  # a method that has no scores for one kind of query
    (first, second) = yardstick_page.falls(
        report | {"rows": [row | {"method": "ReTracRidge"} for row in report["rows"]]}
    )
    assert (first["truth"], second["figure"]) == ("tiny-lds", "first of 4, digit, held out")


def test_a_removal_is_told_beyond_random_samples_and_other_queries(report: dict[str, Any]) -> None:
    found = Removal(*(np.array(x) for x in ([0.5, 0.7], [0.1, 0.3], [0.2, 0.2], [0.9, 0.8], [0.4, 0.4], [0.5, 0.6])))
    about = {"command": "python", "machine": "some", "date": "2026-01-01", "setting": "tiny", "removed": 4}
    about |= {"samples": N, "random": 8, "hours": 0.5, "lines": {"one": removal.line(found)}}
    page = yardstick_page.leaderboard([report], [about])
    one, at_random = page.split("## Removal: tiny")[1].split("\n| ")[3:5]
    told = [cell.split(" [")[0] for cell in one.split(" | ")]
    assert told[:8] == ["one", "2", "0.6", "0.4", "0.4", "0.85", "0.3", "0.45"]
    assert at_random.startswith("as many random samples | 2 | 0.2 [")


def test_the_readme_is_changed_between_its_markers_alone(report: dict[str, Any]) -> None:
    before, after = yardstick_page.MARKERS
    readme = f"one\n{before}old\n{after}two\n"
    found = yardstick_page.with_comparison(readme, [report])
    assert found.startswith(f"one\n{before}| method")
    assert found.endswith(f"{after}two\n")
    assert "0.6 [0.5, 0.7]" in found
    assert yardstick_page.with_comparison(found, [report]) == found
    assert yardstick_page.with_comparison("no markers", [report]) == "no markers"


def test_pages_of_the_repository_are_those_of_its_results() -> None:
    root = Path(yardstick.__file__).parent.parent
    reports = [json.loads(file.read_text()) for file in sorted((root / "benchmarks/results").glob("yardstick-*.json"))]
    assert reports
    removals = [json.loads(file.read_text()) for file in sorted((root / "benchmarks/results").glob("removal-*.json"))]
    assert (root / "docs/leaderboard.md").read_text() == yardstick_page.leaderboard(reports, removals)
    readme = (root / "README.md").read_text()
    assert yardstick_page.with_comparison(readme, reports) == readme
    for report in reports:
        page: Callable[[Any], str] = yardstick_page.setting_page
        assert (root / f"benchmarks/results/yardstick-{report['setting']}.md").read_text() == page(report)
