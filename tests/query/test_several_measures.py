"""Several measured functions side by side in one index, against an index of each."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from dask.distributed import Client, LocalCluster
from diffusers import DDPMScheduler

import retrac_scale as rs
from retrac_scale.cli import main
from retrac_scale.measurement.halves import _alone
from retrac_scale.report import norm_curve
from retrac_scale.serve.library import Library
from tests.conftest import random_images, tiny_unet

BOTH: Any = ("mse", "mean_squared_output")
SAMPLES, QUERIES = 40, 5


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Training samples, of which more came later, and queries, under two measures at four timesteps."""
    folder, model = tmp_path_factory.mktemp("both"), tiny_unet()
    task = rs.DiffusionTask(model, DDPMScheduler(), measure=BOTH)
    options: dict[str, Any] = {
        "checkpoints": {"last": {name: value.clone() for name, value in model.state_dict().items()}},
        "timesteps": [rs.EvenlySpaced(3), rs.Explicit([7], noise="common")],
        "batch_size": 32,
        "dtype": "float32",
        "progress": False,
    }
    images = random_images(SAMPLES + QUERIES)
    training = folder / "store.zarr"
    rs.sketch(task, images[: SAMPLES - 8], training, projection=rs.LowRank(dim=64), **options)
    rs.sketch(task, images[:SAMPLES], training, grow=True, **options)
    rs.sketch(task, images[SAMPLES:], folder / "queries.zarr", like=rs.open_store(training), **options)
    return folder


def opened(folder: Path, measure: Any = BOTH) -> tuple[rs.SketchStore, rs.SketchStore]:
    """The training samples and the queries under some measures."""
    return rs.open_store(folder / "store.zarr", measure=measure), rs.open_store(
        folder / "queries.zarr", measure=measure
    )


def test_they_stand_side_by_side_like_further_timesteps(folder: Path) -> None:
    store, queries = opened(folder)
    apart = [opened(folder, measure)[0] for measure in BOTH]
    assert store.shape == (SAMPLES, 8, 64)
    assert store.fingerprint["measure"] == list(BOTH)
    assert len(store.fingerprint["timesteps"]) == 2 * len(apart[0].fingerprint["timesteps"])
    for quantity in ("sketches", "norms", "losses", "timesteps"):
        expected = np.concatenate([getattr(one, quantity)("last") for one in apart], axis=1)
        np.testing.assert_array_equal(getattr(store, quantity)("last"), expected)
    assert store.refresh().shape == store.shape
    swapped = rs.open_store(folder / "store.zarr", measure=BOTH[::-1])
    np.testing.assert_array_equal(swapped.norms("last")[:, :4], store.norms("last")[:, 4:])
    assert rs.open_store(folder / "store.zarr", measure=["mse"]).fingerprint["measure"] == "mse"
    index = rs.build_index(store, dtype="float32")
    with pytest.raises(ValueError, match="measure"):
        index.query(opened(folder, "mse")[1], 3)
    with pytest.raises(ValueError, match="measure"):
        rs.build_index(apart[0]).query(queries, 3)
    with pytest.raises(ValueError, match="has no measure 'l1'"):
        opened(folder, ("mse", "l1"))
    with pytest.raises(ValueError, match="name the measures to open"):
        opened(folder, ())


def test_scores_are_the_sum_of_those_of_each(folder: Path, tmp_path: Path) -> None:
    store, queries = opened(folder)
    expected = sum(
        np.asarray(rs.build_index(one, rs.ReTracRidge(), dtype="float32").scores(asked))
        for one, asked in (opened(folder, measure) for measure in BOTH)
    )
    index = rs.build_index(store, rs.ReTracRidge(), tmp_path / "index.zarr", dtype="float32")
    np.testing.assert_allclose(np.asarray(index.scores(queries)), expected, rtol=1e-4, atol=1e-5)
    with (
        LocalCluster(n_workers=1, threads_per_worker=1, processes=False, dashboard_address=":0") as cluster,
        Client(cluster) as client,
    ):
        built = rs.build_index(store, rs.ReTracRidge(), tmp_path / "there.zarr", dtype="float32", client=client)
    for one in (rs.open_index(tmp_path / "index.zarr"), built):
        answer = one.query(queries, 3)
        np.testing.assert_allclose(answer.scores, -np.sort(-expected, axis=1)[:, :3], rtol=1e-4)
        assert one.check_store() is not None


def test_an_index_of_several_grows_with_its_store(tmp_path: Path) -> None:
    model, images, training = tiny_unet(), random_images(SAMPLES), tmp_path / "store.zarr"
    task = rs.DiffusionTask(model, DDPMScheduler(), measure=BOTH)
    options: dict[str, Any] = {"checkpoints": {"last": dict(model.state_dict())}, "timesteps": rs.EvenlySpaced(2)}
    options |= {"projection": rs.CountSketch(16), "progress": False}
    rs.sketch(task, images[:-5], training, **options)
    place, plain = tmp_path / "index.zarr", rs.ReTrac("matched")
    old = rs.build_index(rs.open_store(training, measure=BOTH), plain, place)
    asked = rs.sketch(task, images[:3], None, like=rs.open_store(training, measure=BOTH), **options)
    files = {file: file.stat().st_mtime_ns for file in place.rglob("c/**/*") if file.is_file()}
    rs.sketch(task, images, training, grow=True, **options)
    old.patient = True
    assert set(old.query(asked, 50).ids.ravel()) <= set(range(SAMPLES - 5))
    grown = rs.build_index(rs.open_store(training, measure=BOTH), plain, place)
    whole = rs.build_index(rs.open_store(training, measure=BOTH), plain)
    assert {file: file.stat().st_mtime_ns for file in files} == files
    np.testing.assert_array_equal(grown.query(asked, 50).ids, whole.query(asked, 50).ids)


def test_they_are_indexed_and_asked_by_commands(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store, queries = opened(folder)
    expected = rs.build_index(store).query(queries, 3)
    place = str(tmp_path / "index.zarr")
    assert main(["index", str(folder / "store.zarr"), place, "--measure", ",".join(BOTH)]) == 0
    capsys.readouterr()
    assert main(["query", place, str(folder / "queries.zarr"), "-k", "3", "--json"]) == 0
    lists = json.loads(capsys.readouterr().out)["results"]
    for own, ids, scores in zip(lists, expected.ids, expected.scores, strict=True):
        assert own["ids"] == ids.tolist()
        assert own["scores"] == pytest.approx(scores.tolist(), rel=1e-5)


def test_plans_that_came_in_another_order_stand_side_by_side_all_the_same(tmp_path: Path) -> None:
    model, images, out = tiny_unet(), random_images(4), tmp_path / "store.zarr"
    options: dict[str, Any] = {"checkpoints": {"last": dict(model.state_dict())}, "projection": rs.CountSketch(16)}
    plans: list[Any] = [rs.EvenlySpaced(2), rs.Explicit([7], noise="common")]
    for measure, ordered in zip(BOTH, (plans, plans[::-1]), strict=True):
        task = rs.DiffusionTask(model, DDPMScheduler(), measure=measure)
        for plan in ordered:
            rs.sketch(task, images, out, timesteps=plan, grow=out.exists(), progress=False, **options)
    store = rs.open_store(out, measure=BOTH)
    steps = store.timesteps("last")
    np.testing.assert_array_equal(steps[:, :3], steps[:, 3:])
    for place, measure in enumerate(BOTH):
        one = rs.open_store(out, measure=measure)
        order = [one.timesteps("last")[0].tolist().index(step) for step in steps[0, :3]]
        expected = one.sketches("last")[:, order]
        np.testing.assert_array_equal(store.sketches("last")[:, 3 * place : 3 * place + 3], expected)


def test_measures_at_other_timesteps_do_not_stand_side_by_side(tmp_path: Path) -> None:
    model, out = tiny_unet(), tmp_path / "store.zarr"
    options: dict[str, Any] = {"checkpoints": {"last": dict(model.state_dict())}, "progress": False}
    for measure, plan in zip(BOTH, (rs.EvenlySpaced(2), rs.EvenlySpaced(3)), strict=True):
        task = rs.DiffusionTask(model, DDPMScheduler(), measure=measure)
        rs.sketch(task, random_images(2), out, timesteps=plan, grow=out.exists(), **options)
    with pytest.raises(ValueError, match="at other timesteps, which cannot stand side by side"):
        rs.open_store(out, measure=BOTH)


def test_estimators_of_one_function_or_of_means_refuse_several(folder: Path) -> None:
    with pytest.raises(ValueError, match="average gradients of mse and mean_squared_output"):
        rs.build_index(opened(folder)[0], rs.TracIn())
    with pytest.raises(ValueError, match="differentiates mean_squared_output"):
        rs.build_index(opened(folder)[0], rs.DTRAK(pairing="matched"))


def test_functions_of_a_forward_pass_are_one_measurement(folder: Path) -> None:
    store, queries = opened(folder)
    index = rs.build_index(store, dtype="float32")
    found = rs.repeatability(index, queries, k=5)
    assert found.measurements == 4
    rows = index.query_rows(queries)
    expected = rows.reshape(1, QUERIES, 2, 4, 64).copy()
    expected[:, :, :, [1, 2]] = 0
    np.testing.assert_array_equal(_alone(rows, (0, 3), 2, 4), expected.reshape(rows.shape))
    answer = index.query(queries, 3)
    assert answer.errors is not None
    for row in range(QUERIES):
        explained = index.explain(rs.take(queries, queries.ids[row : row + 1]), answer.ids[row, 0])
        assert explained.measures == list(BOTH)
        assert "mse, then mean_squared_output" in explained.figure().axes[0].get_xlabel()
        parts = np.diag(explained.contributions[0]).reshape(2, 4).sum(0)
        assert parts.sum() == pytest.approx(answer.scores[row, 0], rel=1e-5)
        assert answer.errors[row, 0] == pytest.approx(np.sqrt(4 / 3 * np.square(parts - parts.mean()).sum()), rel=1e-4)


def test_samples_are_sketched_and_asked_like_several(folder: Path, tmp_path: Path) -> None:
    store, queries = opened(folder)
    model, images = tiny_unet(), random_images(SAMPLES + QUERIES)[SAMPLES:]
    checkpoints = {"last": dict(model.state_dict())}
    task = rs.DiffusionTask(model, DDPMScheduler(), measure=("output_l1", *BOTH[::-1]))
    for out in (None, tmp_path / "asked.zarr"):
        found = rs.sketch(task, images, out, checkpoints=checkpoints, like=store, dtype="float32", progress=False)
        assert found.fingerprint["measure"] == list(BOTH)
        np.testing.assert_allclose(found.sketches("last"), queries.sketches("last"), rtol=1e-4, atol=1e-5)
    index = rs.build_index(store, rs.ReTracRidge(), tmp_path / "index.zarr")
    answer = index.query(rs.Samples(images, task, checkpoints), 3)
    np.testing.assert_array_equal(answer.ids, index.query(queries, 3).ids)
    with pytest.raises(ValueError, match=r"holds mse and mean_squared_output side by side, and the task measures mse;"):
        rs.sketch(task.only("mse"), images, None, checkpoints=checkpoints, like=store)
    samples = rs.Samples(images, task, checkpoints)
    plain = rs.build_index(store, rs.ReTrac("matched"), tmp_path / "plain.zarr")
    with pytest.raises(ValueError, match="rerank takes gradients of one function"):
        plain.query(samples, 3, rerank=5, train=samples)


def test_the_service_asks_each_index_for_its_own_store(folder: Path, tmp_path: Path) -> None:
    indexes = {
        name: rs.build_index(opened(folder, measure)[0], rs.ReTracRidge(), tmp_path / name)
        for name, measure in (("one", "mse"), ("both", BOTH))
    }
    shapes = Library._by_store(type("Of", (), {"indexes": indexes})(), lambda store: store.shape)
    assert shapes == {"one": (SAMPLES, 4, 64), "both": (SAMPLES, 8, 64)}


def test_samples_that_were_taken_stay_under_all_measures(folder: Path) -> None:
    store, _ = opened(folder)
    some = rs.take(store, store.ids[[1, 2]])
    assert some.measurements == list(BOTH)
    np.testing.assert_array_equal(some.under(*BOTH).sketches("last"), store.sketches("last")[[1, 2]])
    with pytest.raises(ValueError, match="mse and mean_squared_output side by side, which are not told apart any more"):
        some.under("mse")


def test_the_curve_of_norms_is_of_the_first_measure(folder: Path) -> None:
    for one, other in zip(norm_curve(opened(folder)[0]), norm_curve(opened(folder, "mse")[0]), strict=True):
        np.testing.assert_array_equal(one, other)
