"""sketch(): agreement with the oracle, independence of batches, resuming, and errors that name the culprit."""

from __future__ import annotations

import time
import weakref
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, UNet2DModel
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import Dataset, Subset, TensorDataset

import retrac_scale as rs
from retrac_scale.gradients.errors import GradientMismatchError
from retrac_scale.projections import GradientSketcher
from retrac_scale.sketching import calibration
from retrac_scale.sketching.calibration import as_before, fastest, fastest_batch, torch_threads
from retrac_scale.task.measures import measure_name, measure_named
from tests import oracle
from tests.conftest import MODELS, Labelled, random_images, tiny_dit, tiny_unet
from tests.small_denoiser import SmallDenoiser, images

SCHEDULER = DDPMScheduler(num_train_timesteps=100, beta_schedule="squaredcos_cap_v2")


def run(model: Any, dataset: Any, timesteps: Any, projection: Any = None, **options: Any) -> rs.SketchStore:
    checkpoints = options.pop("checkpoints", {"last": {k: v.clone() for k, v in model.state_dict().items()}})
    task = rs.DiffusionTask(model, SCHEDULER, measure=options.pop("measure", "mse"))
    # a batch of its own choosing would round otherwise in another store
    arguments = {"dtype": "float32", "batch_size": 8, "progress": False, **options}
    return rs.sketch(
        task,
        dataset,
        arguments.pop("out", None),
        checkpoints=checkpoints,
        timesteps=timesteps,
        projection=projection or rs.Identity(),
        **arguments,
    )


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("measure", ["mse", "l1"])
def test_gradients_and_norms_equal_the_oracle(kind: str, seed: int, measure: str) -> None:
    model = MODELS[kind](seed)
    dataset = Labelled(random_images(3, seed))
    store = run(model, dataset, rs.Explicit([3, 70], noise="own"), measure=measure, batch_size=4)
    for sample in range(3):
        for column, timestep in enumerate([3, 70]):
            labels = {"class_labels": torch.tensor(sample)} if kind == "dit" else {}
            expected = oracle.pair_gradient(
                model,
                model.state_dict(),
                SCHEDULER,
                dataset.images[sample],
                sample,
                timestep,
                measure=measure,
                conditioning=labels,
            )
            scale = np.linalg.norm(expected)
            assert np.linalg.norm(store.sketches("last")[sample, column] - expected) < 1e-4 * scale
            assert abs(store.norms("last")[sample, column] - scale) < 1e-4 * scale


@pytest.mark.parametrize("seed", [0, 1])
def test_several_draws_give_the_mean_gradient_and_its_norm(seed: int) -> None:
    model = tiny_unet(seed)
    images = random_images(2, seed)
    store = run(model, images, rs.Explicit([50], draws=3, noise="own"))
    for sample in range(2):
        expected = oracle.pair_gradient(model, model.state_dict(), SCHEDULER, images[sample], sample, 50, draws=3)
        np.testing.assert_allclose(
            store.sketches("last")[sample, 0], expected, atol=1e-5 * float(np.linalg.norm(expected))
        )
        np.testing.assert_allclose(store.norms("last")[sample, 0], np.linalg.norm(expected), rtol=1e-4)


def two_gradients(kind: str) -> tuple[Any, Any]:
    """A model and the oracle's gradients of two of its pairs, `[2, P]`."""
    model, images = MODELS[kind](0), random_images(2)
    labels = [{"class_labels": torch.tensor(i)} if kind == "dit" else {} for i in range(2)]
    gradients = [
        oracle.pair_gradient(model, model.state_dict(), SCHEDULER, images[i], i, 40, conditioning=labels[i])
        for i in range(2)
    ]
    return model, torch.from_numpy(np.stack(gradients)).float()


def project(model: Any, projection: Any, gradients: torch.Tensor) -> torch.Tensor:
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    projector = projection.bind(shapes, {}, torch.device("cpu"))
    accumulator = projector.start(len(gradients))
    sizes = [int(np.prod(shape)) for shape in shapes.values()]
    for name, part in zip(shapes, torch.split(gradients, sizes, dim=1), strict=True):
        projector.add(accumulator, name, part.reshape(-1, *shapes[name]))
    return projector.finish(accumulator)  # type: ignore[no-any-return]


@pytest.mark.parametrize("kind", MODELS)
def test_countsketch_of_a_pair_is_the_projection_of_the_oracle_gradient(kind: str) -> None:
    model, gradients = two_gradients(kind)
    expected = project(model, rs.CountSketch(256, 5), gradients)
    store = run(model, Labelled(random_images(2)), rs.Explicit([40], noise="own"), rs.CountSketch(256, 5))
    torch.testing.assert_close(
        torch.from_numpy(store.sketches("last")[:, 0]), expected, rtol=0, atol=1e-4 * float(expected.abs().max())
    )


@pytest.mark.parametrize("kind", ["unet", "dit"])
def test_countsketch_inner_products_stay_within_the_variance_bound_over_200_seeds(kind: str) -> None:
    model, gradients = two_gradients(kind)
    x, y = gradients.double()
    true = float(x @ y)
    errors = []
    for seed in range(200):
        a, b = project(model, rs.CountSketch(256, seed), gradients).double()
        errors.append(float(a @ b) - true)
    bound = float((x @ x) * (y @ y) + true**2) / 256
    assert abs(np.mean(errors)) < 4 * np.sqrt(bound / 200)
    # 200 draws put the sample variance within 4 sqrt(2/200) = 40 % of the true one
    assert np.mean(np.square(errors)) < 1.4 * bound


@settings(max_examples=6)
@given(order=st.permutations(range(6)), batch_size=st.integers(1, 9), draws=st.integers(1, 2))
def test_a_sketch_does_not_depend_on_batch_place_or_order(order: list[int], batch_size: int, draws: int) -> None:
    model = tiny_unet()
    images = random_images(6)
    plan = rs.EvenlySpaced(2, draws=draws, noise="own")
    alone = run(model, Labelled(images, ids=list(range(6))), plan, rs.CountSketch(128), batch_size=1)
    mixed = run(model, Labelled(images[order], ids=order), plan, rs.CountSketch(128), batch_size=batch_size)
    expected = alone.sketches("last")[order]
    np.testing.assert_allclose(mixed.sketches("last"), expected, atol=2e-5 * np.abs(expected).max())
    np.testing.assert_allclose(mixed.norms("last"), alone.norms("last")[order], rtol=1e-4)


def test_recorded_pairs_replay_the_timestep_and_noise_of_training(tmp_path: Path) -> None:
    model = tiny_unet()
    images = random_images(3)
    recorder = rs.TrainingRecorder(tmp_path / "recorded", 3, SCHEDULER)
    recorder.step([0, 1, 2], [1, 2, 3], 10, lr=0.5)
    recorder.step(torch.tensor([2, 0]), torch.tensor([90, 80]), 11, lr=0.25)
    recorder.checkpoint("last")
    store = run(model, images, rs.Recorded(tmp_path / "recorded"))
    assert store.timesteps("last").tolist() == [[80], [2], [90]]
    assert store.weights["last"] == pytest.approx(0.5 * 3 / 3 + 0.25 * 2 / 3)
    for sample, (timestep, seed) in enumerate([(80, 11), (2, 10), (90, 11)]):
        expected = oracle.pair_gradient(
            model, model.state_dict(), SCHEDULER, images[sample], sample, timestep, seed=seed
        )
        np.testing.assert_allclose(
            store.sketches("last")[sample, 0], expected, atol=1e-5 * float(np.linalg.norm(expected))
        )


def test_a_training_step_that_used_draw_noise_is_replayed_exactly(tmp_path: Path) -> None:
    model = tiny_unet()
    images = random_images(4)
    ids, steps = [3, 1], torch.tensor([60, 5])
    noise = rs.draw_noise((1, 8, 8), ids, steps, 7)
    loss = (model(SCHEDULER.add_noise(images[ids], noise, steps), steps).sample - noise).square().mean()
    expected = oracle.gradient(model, loss).numpy()
    recorder = rs.TrainingRecorder(tmp_path, 4, SCHEDULER)
    recorder.step([0, 2], [1, 1], 6, lr=1.0)
    recorder.step(ids, steps, 7, lr=1.0)
    recorder.checkpoint("last")
    sketches = run(model, images, rs.Recorded(tmp_path)).sketches("last")[ids, 0]
    np.testing.assert_allclose(sketches.mean(0), expected, atol=1e-5 * float(np.linalg.norm(expected)))


def test_an_interrupted_run_computes_only_what_is_missing(tmp_path: Path) -> None:
    model = tiny_unet()
    images = random_images(70)

    class Failing(Labelled):
        broken = True
        read: list[int] = []  # noqa: RUF012

        def __getitem__(self, row: int) -> Any:
            self.read.append(row)
            if self.broken and row == 65 and self.read.count(65) > 2:
                raise OSError("disk gone")
            return self.images[row]

    dataset = Failing(images)
    states = {name: {k: v.clone() for k, v in tiny_unet(seed).state_dict().items()} for seed, name in enumerate("ab")}
    arguments = {"checkpoints": states, "dtype": "int8"}
    with pytest.raises(rs.FailedTasksError, match="sketch-b-samples-64-70: OSError: disk gone"):
        run(model, dataset, rs.Explicit([5]), rs.CountSketch(64), out=tmp_path / "s", **arguments)
    partial = rs.open_store(tmp_path / "s")
    assert partial.committed("a").all()
    assert partial.committed("b").tolist() == [True, False]
    with pytest.raises(rs.IncompleteStoreError, match=r"checkpoint 'b', samples 64 \.\. 69"):
        partial.sketches("b")
    assert partial.sketches("b", slice(0, 64)).shape == (64, 1, 64)
    dataset.broken = False
    dataset.read.clear()
    resumed = run(model, dataset, rs.Explicit([5]), rs.CountSketch(64), out=tmp_path / "s", **arguments)
    assert sorted(dataset.read) == sorted([*range(70), *range(64, 70)])  # the check of items, and the missing block
    whole = run(model, images, rs.Explicit([5]), rs.CountSketch(64), **arguments)
    for name in "ab":
        np.testing.assert_array_equal(resumed.sketches(name), whole.sketches(name))


MEASURES = ("mse", "mean_squared_output", "output_linf")


def count_forward_passes(model: Any) -> list[int]:
    passes: list[int] = []

    def count(*_: Any) -> None:
        passes.append(1)

    model.register_forward_hook(count)
    return passes


def assert_same(store: rs.SketchStore, other: rs.SketchStore) -> None:
    assert store.fingerprint["measure"] == other.fingerprint["measure"]
    for name in other.checkpoints:
        for quantity in ("sketches", "norms", "losses", "timesteps"):
            np.testing.assert_array_equal(getattr(store, quantity)(name), getattr(other, quantity)(name))


@pytest.mark.usefixtures("small_layers_mixed")
@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("projection", [rs.LowRank(4, 64), rs.CountSketch(64)])
def test_measures_of_one_forward_pass_equal_separate_runs_bit_for_bit(
    kind: str, projection: Any, tmp_path: Path
) -> None:
    model, dataset, plan = MODELS[kind](0), Labelled(random_images(5)), rs.EvenlySpaced(3, draws=2)
    passes = count_forward_passes(model)
    first = run(model, dataset, plan, projection, out=tmp_path / "s", measure=MEASURES)
    shared = len(passes)
    assert first.measurements == list(MEASURES)
    assert_same(first, rs.open_store(tmp_path / "s", measure="mse"))
    for measure in MEASURES:
        passes.clear()
        alone = run(model, dataset, plan, projection, out=tmp_path / measure, measure=measure)
        assert_same(rs.open_store(tmp_path / "s", measure=measure), alone)
    checks = 2 * (len(MEASURES) - 1)  # of some pairs of each measure, and of the first one alone
    assert shared == len(passes) + checks


def test_several_measures_resume_where_any_of_them_stopped(tmp_path: Path) -> None:
    model, images, plan = tiny_unet(), random_images(70), rs.Explicit([5])
    states = {name: {k: v.clone() for k, v in tiny_unet(seed).state_dict().items()} for seed, name in enumerate("ab")}

    def both(measure: Any = ("mse", "l1"), **options: Any) -> rs.SketchStore:
        arguments = {"out": tmp_path / "s", "checkpoints": states, **options}
        return run(model, images, plan, rs.CountSketch(64), measure=measure, batch_size=64, **arguments)

    both("mse", checkpoints={"a": states["a"]})
    with pytest.raises(ValueError, match="checkpoints"):
        both()
    both(grow=True)
    (record,) = (tmp_path / "s").glob("parts/0002-*/b/commit/c.1.0")  # of l1: mse has a part for each checkpoint
    record.unlink()
    with pytest.raises(rs.IncompleteStoreError, match=r"checkpoint 'b', samples 64 \.\. 69"):
        rs.open_store(tmp_path / "s", measure="l1").sketches("b")
    passes = count_forward_passes(model)
    both(grow=True)
    assert len(passes) == 3  # the block, the check of some of its pairs, and of the first alone
    both(grow=True)
    assert len(passes) == 3
    both("l1", out=tmp_path / "begun")
    assert both(("l1", "mse"), out=tmp_path / "begun").measurements == ["l1", "mse"]
    for measure in ("mse", "l1"):
        alone = both(measure, out=None)
        for place in ("s", "begun"):
            assert_same(rs.open_store(tmp_path / place, measure=measure), alone)


def test_queries_are_measured_like_a_store_in_one_or_all_of_its_measures(tmp_path: Path) -> None:
    model, images = tiny_unet(), random_images(4)
    state = {"c": {k: v.clone() for k, v in model.state_dict().items()}}
    both: dict[str, Any] = {"timesteps": rs.Explicit([5, 40]), "checkpoints": state, "measure": ("mse", "output_l2")}
    store = run(model, images, projection=rs.CountSketch(64), out=tmp_path / "s", **both)
    norms = rs.open_store(tmp_path / "s", measure="output_l2")
    run(model, images[:2], out=tmp_path / "q", like=store, projection=rs.CountSketch(64), **both)
    task = rs.DiffusionTask(model, SCHEDULER, measure=both["measure"])
    for of, estimator in ((store, rs.ReTrac()), (norms, rs.DTRAK())):
        index = rs.build_index(of, estimator, None)
        stored = index.query(rs.open_store(tmp_path / "q", measure=of.fingerprint["measure"]), 3)
        sketched = index.query(rs.Samples(images[:2], task, state, both["timesteps"]), 3)
        np.testing.assert_array_equal(stored.ids, sketched.ids)
    held = run(model, images, projection=rs.CountSketch(64), **both)  # in memory
    for measure in both["measure"]:
        assert_same(held.under(measure), rs.open_store(tmp_path / "s", measure=measure))
    side_by_side = held.under(*both["measure"])
    assert side_by_side.shape == (4, 4, 64)
    assert run(model, images[:2], like=side_by_side, projection=rs.CountSketch(64), **both).shape == (2, 4, 64)
    assert run(model, images[:2], like=norms, projection=rs.CountSketch(64), **both).measurements == ["output_l2"]
    with pytest.raises(ValueError, match="measure is 'mse' there and 'l1' here"):
        run(model, images, like=store, projection=rs.CountSketch(64), out=tmp_path / "r", **{**both, "measure": "l1"})


def test_a_different_run_is_refused_with_the_field_that_differs(tmp_path: Path) -> None:
    model, images = tiny_unet(), random_images(2)
    run(model, images, rs.Explicit([5]), rs.CountSketch(64), out=tmp_path / "s")
    with pytest.raises(ValueError, match=r"fingerprint\.projection\.seed is 0 there and 1 here"):
        run(model, images, rs.Explicit([5]), rs.CountSketch(64, seed=1), out=tmp_path / "s")


def test_the_model_keeps_its_own_weights() -> None:
    model = tiny_unet(0)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    run(model, random_images(1), rs.Explicit([5]), checkpoints={"other": tiny_unet(1).state_dict()})
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


@pytest.mark.parametrize("suffix", ["pt", "folder", "callable"])
def test_checkpoints_are_read_from_files_folders_and_callables(tmp_path: Path, suffix: str) -> None:
    other = tiny_unet(1)
    given: Any = tmp_path / "weights.pt"
    if suffix == "pt":
        torch.save(other.state_dict(), given)
    elif suffix == "folder":
        given = tmp_path / "unet"
        other.save_pretrained(given)  # type: ignore[operator]
    else:
        given = other.state_dict
    images = random_images(1)
    store = run(tiny_unet(0), images, rs.Explicit([5]), checkpoints={"c": given})
    expected = run(other, images, rs.Explicit([5]))
    np.testing.assert_array_equal(store.sketches("c"), expected.sketches("last"))


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "shape": (
        {"dataset": [*random_images(2), torch.zeros(1, 9, 9)]},
        r"dataset item 2 has shape \(1, 9, 9\), but the model takes \(1, 8, 8\)",
    ),
    "nan": ({"dataset": [torch.full((1, 8, 8), torch.nan)]}, "dataset item 0 has NaN"),
    "id": (
        {"dataset": Labelled(random_images(3), ids=["x", "y", "x"])},
        r"id .*'x'.* is given twice, at positions \[0, 2\]",
    ),
    "timestep": ({"timesteps": rs.Explicit([5, 100])}, "timestep 100 is outside the scheduler's range 0 .. 99"),
    "count": ({"timesteps": rs.EvenlySpaced(100)}, "lower the count"),
    "checkpoint": (
        {"checkpoints": {"dit": tiny_dit().state_dict()}},
        "checkpoint 'dit' does not fit the model: it lacks conv_in.weight",
    ),
    "missing file": ({"checkpoints": {"a": "nowhere.pt"}}, "checkpoint 'a': there is no file .*nowhere.pt"),
    "empty": ({"dataset": []}, "the dataset is empty"),
    "record": ({"timesteps": rs.Recorded("nowhere")}, "no training record for checkpoint 'last' in nowhere"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named_before_any_work(case: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    changes, message = BAD[case]
    arguments = {"dataset": random_images(2), "timesteps": rs.Explicit([5]), **changes}
    model = tiny_unet()
    started = []
    model.register_forward_hook(lambda *_: started.append(1))
    with pytest.raises(ValueError, match=message):
        run(model, arguments.pop("dataset"), arguments.pop("timesteps"), out=tmp_path / "s", **arguments)
    assert not started
    assert not (tmp_path / "s").exists()


def test_a_gradient_that_is_not_finite_is_named_and_nothing_is_written(tmp_path: Path) -> None:
    model = tiny_unet()
    state = {k: v.clone() for k, v in model.state_dict().items()}
    state["conv_out.bias"][:] = torch.inf
    with pytest.raises(rs.FailedTasksError, match="NaN or infinite at checkpoint 'bad', sample 0, timestep 5"):
        run(model, random_images(2), rs.Explicit([5]), checkpoints={"bad": state}, out=tmp_path / "s")
    assert not rs.open_store(tmp_path / "s").committed("bad").any()


@pytest.mark.slow
def test_dask_workers_write_the_same_store(tmp_path: Path) -> None:
    from distributed import Client, LocalCluster

    model, images = tiny_unet(), random_images(130)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    arguments = {"checkpoints": {"c": state}, "dtype": "int8", "out": tmp_path / "here", "measure": ("mse", "l1")}
    local = run(model, images, rs.Explicit([5]), rs.CountSketch(64), **arguments)
    with (
        LocalCluster(n_workers=2, threads_per_worker=1, processes=True, dashboard_address=":0") as cluster,
        Client(cluster) as client,
    ):
        client.run(torch.set_num_threads, 1)
        arguments["out"] = tmp_path / "s"
        store = run(model, images, rs.Explicit([5]), rs.CountSketch(64), client=client, **arguments)
        for measure in ("mse", "l1"):
            assert_same(*(rs.open_store(tmp_path / name, measure=measure) for name in ("s", "here")))
        index = rs.build_index(store, rs.ReTrac(), tmp_path / "i", client=client)
        answer = index.query(store, k=5, client=client)
    here = rs.build_index(local, rs.ReTrac(), None).query(local, k=5)
    np.testing.assert_array_equal(answer.ids, here.ids)


def test_a_model_whose_samples_meet_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    class Centred(UNet2DModel):  # type: ignore[misc]
        def forward(self, sample: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            return super().forward(sample - sample.mean(0), *args, **kwargs)

    model = tiny_unet()
    model.__class__ = Centred
    with pytest.raises(
        rs.projections.GradientMismatchError, match=r"checkpoint 'last', sample 0, timestep 3: .* conv_in"
    ):
        run(model, random_images(3), rs.Explicit([3]), rs.CountSketch(64), out=tmp_path / "s")
    assert not rs.open_store(tmp_path / "s").committed("last").any()


def test_a_resumed_run_obeys_the_recorded_plan(tmp_path: Path) -> None:
    model, images = tiny_unet(), random_images(3)
    plan = run(model, images, rs.Explicit([3, 9]), rs.LowRank(), out=tmp_path / "s", batch_size=5).plan
    assert plan == {"batch_rows": 5, "threads": torch.get_num_threads(), "sample": [1, 8, 8], "pictures": False}
    assert run(model, images, rs.Explicit([3, 9]), rs.LowRank(), out=tmp_path / "s", batch_size=2).plan == plan


def test_an_automatic_batch_stays_within_the_pairs_there_are() -> None:
    store = run(tiny_unet(), random_images(2), rs.Explicit([3, 9]), None, batch_size="auto")
    assert 1 <= store.plan["batch_rows"] <= 4


def test_a_subset_keeps_the_ids_columns_and_timesteps_of_its_samples(tmp_path: Path) -> None:
    whole = WithIds(images(6), np.array([10, 11, 12, 13, 14, 15]))
    part = run(SmallDenoiser(), Subset(Subset[Any](whole, [5, 3, 1]), [0, 2]), rs.Explicit([5]))
    alone = run(SmallDenoiser(), whole, rs.Explicit([5]))
    assert part.ids.tolist() == [15, 11]
    assert part.columns["label"].tolist() == ["f", "b"]
    np.testing.assert_allclose(part.sketches("last"), alone.sketches("last")[[5, 1]], rtol=1e-5, atol=1e-6)


class WithIds(Dataset[torch.Tensor]):
    def __init__(self, data: torch.Tensor, ids: Any) -> None:
        self.data, self.ids, self.columns = data, ids, {"label": np.resize(np.array(list("abcdef")), len(data))}

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, row: int) -> torch.Tensor:
        return self.data[row]


def test_a_subset_without_ids_is_not_taken_for_the_first_samples_of_a_record(tmp_path: Path) -> None:
    recorder = rs.TrainingRecorder(tmp_path, 6, SCHEDULER)
    recorder.step(np.arange(6), np.arange(6) + 10, 0, 0.1)
    recorder.checkpoint("last")
    with pytest.raises(ValueError, match="Subset of 2 samples without ids and the record is of 6"):
        run(SmallDenoiser(), Subset(TensorDataset(images(6)), [4, 5]), rs.Recorded(tmp_path))


def test_no_more_samples_are_held_than_a_batch_needs() -> None:
    alive: list[weakref.ref[torch.Tensor]] = []
    most = 0

    class Watched(WithIds):
        def __getitem__(self, row: int) -> torch.Tensor:
            nonlocal most
            item = self.data[row].clone()
            alive.append(weakref.ref(item))
            most = max(most, sum(reference() is not None for reference in alive))
            return item

    run(SmallDenoiser(), Watched(images(6).repeat(8, 1, 1, 1), None), rs.Explicit([5, 20]), batch_size=4)
    assert most <= 6  # a batch of two samples, the next one, and the first of the block


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_items_of_another_floating_type_are_measured_in_the_models(dtype: torch.dtype) -> None:
    given = images(2).to(dtype)
    found, expected = (run(SmallDenoiser(), data, rs.Explicit([5])) for data in (given, given.float()))
    np.testing.assert_array_equal(found.sketches("last"), expected.sketches("last"))


def test_items_that_a_16_bit_model_cannot_take_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"item 0 has dtype torch.float32, but the model's weights are torch.bfloat16"):
        run(SmallDenoiser().bfloat16(), images(2), rs.Explicit([5]), out=tmp_path / "s")
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"checkpoints": ["last"]}, r"checkpoints=\{'name': path or state dict\}, got \['last'\]"),
        ({"timesteps": 10}, r"timesteps must be a plan, such as EvenlySpaced\(4\), got 10"),
        ({"projection": rs.CountSketch}, "projection must be one"),
        ({"batch_size": 2.5}, "batch_size must be 'auto' or an integer of 1 or more, got 2.5"),
        ({"grow": True}, "give out= its path or URL"),
    ],
)
def test_an_argument_of_the_wrong_kind_is_refused_by_name(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run(SmallDenoiser(), images(2), **{"timesteps": rs.Explicit([5]), **arguments})


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: rs.LowRank(2.5, 64),  # type: ignore[arg-type]
        lambda: rs.LowRank(2, 64),
        lambda: rs.LowRank(6, 64),
        lambda: rs.Explicit(10),  # type: ignore[arg-type]
        lambda: rs.EvenlySpaced(2, draws=2.5),  # type: ignore[arg-type]
        lambda: rs.CountSketch(64.5),  # type: ignore[arg-type]
        lambda: rs.EvenlySpaced(2.5),  # type: ignore[arg-type]
        lambda: rs.build_index(rs.write_store(None, {"c": np.ones((2, 1, 4), np.float32)}), rs.ReTrac, None),  # type: ignore[arg-type]
    ],
)
def test_numbers_and_estimators_of_the_wrong_kind_are_refused(wrong: Any) -> None:
    with pytest.raises(ValueError, match=r"integer|such as ReTrac"):
        wrong()


@pytest.mark.parametrize("measure", ["mse", "l1", rs.Huber(0.5), rs.PseudoHuber(0.2)])
@pytest.mark.parametrize("weighting", [None, rs.MinSNR(3), rs.SD3Weighting("cosmap", True)])
def test_a_measure_is_read_back_from_its_name(measure: Any, weighting: Any) -> None:
    assert measure_named(measure_name(measure, weighting)) == {"measure": measure, "weighting": weighting}


class Meeting(SmallDenoiser):
    """Has samples meet, faintly."""

    share = 0.01

    def forward(self, noisy: torch.Tensor, timesteps: torch.Tensor, return_dict: bool = True) -> Any:
        found = super().forward(noisy, timesteps)[0]
        return (found + self.share * found.mean(0),)


def test_weights_of_16_bits_are_checked_in_32(tmp_path: Path) -> None:
    """What rounding to 8 bits would hide is seen, and the model's own tensors are left in their places."""
    model = SmallDenoiser().bfloat16()
    places = [parameter.data_ptr() for parameter in model.parameters()]
    given = images(4).bfloat16()
    found, full = (run(one, given, rs.Explicit([5])) for one in (model, SmallDenoiser()))
    np.testing.assert_allclose(found.norms("last"), full.norms("last"), rtol=0.02)
    assert [parameter.data_ptr() for parameter in model.parameters()] == places
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    with pytest.raises(GradientMismatchError, match=r"differ in .*last\.weight"):
        run(Meeting().bfloat16(), given, rs.Explicit([5]), out=tmp_path / "s")


class InPlaceOnLSTM(SmallDenoiser):
    """Changes what an LSTM gives in place, which torch allows in 16 bits alone."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(6, 6, batch_first=True)

    def forward(self, noisy: torch.Tensor, timesteps: torch.Tensor, return_dict: bool = True) -> Any:
        hidden = self.lstm(super().forward(noisy, timesteps)[0][:, 0])[0]
        hidden += 1
        return (hidden[:, None],)


def test_a_model_that_torch_cannot_differentiate_in_32_bits_is_checked_in_16() -> None:
    """Seed 314 of benchmarks.fuzz."""
    model, given = InPlaceOnLSTM().half(), images(3).half()
    norms = run(model, given, rs.Explicit([5])).norms("last")[:, 0]
    task = rs.DiffusionTask(model, DDPMScheduler(num_train_timesteps=100))
    losses = task.losses(given, torch.full((3,), 5), rs.draw_noise((1, 6, 6), None, [5] * 3, 0).half(), {})
    for norm, loss in zip(norms, losses, strict=True):
        parameters = list(model.parameters())
        alone = torch.autograd.grad(loss, parameters, retain_graph=True)
        np.testing.assert_allclose(norm, torch.cat([one.float().flatten() for one in alone]).norm(), rtol=0.02)


@pytest.mark.parametrize(("slow", "chosen"), [(2, 1), (1, 2)])
def test_all_threads_are_taken_unless_one_is_faster(slow: int, chosen: int) -> None:
    def run(rows: int) -> torch.Tensor:
        time.sleep(0.002 * rows if torch.get_num_threads() == slow else 0.0001 * rows)
        return torch.zeros(rows)

    with torch_threads(2):
        rows, threads = fastest(run, 128, torch.device("cpu"))
        assert (torch.get_num_threads(), threads) == (2, chosen)
    assert 8 <= rows <= 128


@pytest.mark.parametrize(("compiling", "disturbed"), [(0, None), (40, None), (0, 16), (0, 64)])
def test_neither_compilation_nor_a_disturbed_run_decides_the_batch(
    monkeypatch: pytest.MonkeyPatch, compiling: int, disturbed: int | None
) -> None:
    now, runs = 0.0, Counter[int]()

    def run(rows: int) -> torch.Tensor:
        nonlocal now
        runs[rows] += 1
        longer = compiling * (runs[rows] == 1) + 2.0 * (rows == disturbed and runs[rows] == 2)
        now += 0.05 + 0.001 * min(rows, 64) + 0.002 * max(0, rows - 64) + longer  # which no longer pays beyond 64
        return torch.zeros(rows)

    monkeypatch.setattr(time, "perf_counter", lambda: now)
    assert fastest_batch(run, 1000, torch.device("cpu"))[0] == 64


@pytest.mark.parametrize(
    ("most", "row", "most_runs", "chosen"), [(64, 0.01, 1, 64), (1000, 2.0, 7, 8), (1000, 30.0, 7, 8)]
)
def test_few_rows_and_large_models_are_not_measured_longer_than_they_take(
    monkeypatch: pytest.MonkeyPatch, most: int, row: float, most_runs: int, chosen: int
) -> None:
    now, done = 0.0, 0

    def run(rows: int) -> torch.Tensor:
        nonlocal now, done
        now, done = now + row * rows / torch.get_num_threads(), done + rows
        return torch.zeros(rows)

    monkeypatch.setattr(time, "perf_counter", lambda: now)
    with torch_threads(2):
        assert fastest(run, most, torch.device("cpu")) == (chosen, 2)
    assert done <= most_runs


@pytest.mark.parametrize(("most", "threads", "measured"), [(25, 1, 12), (25, 2, 0), (4, 1, 2), (4, 2, 0)])
def test_what_is_sketched_like_a_store_takes_its_batch(most: int, threads: int, measured: int) -> None:
    runs: list[int] = []

    def run(rows: int) -> torch.Tensor:
        runs.append(rows)
        return torch.zeros(rows)

    with torch_threads(2):
        rows, _ = as_before(run, most, torch.device("cpu"), 16, threads, kept=0)
    assert rows == min(most, 16)
    assert sum(runs) == measured  # threads, by part of the work


def test_questions_are_checked_once_for_a_model_as_it_is_and_what_is_kept_always(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    check, checks = GradientSketcher.check, list[int]()

    def counted(*arguments: Any) -> None:
        checks.append(1)
        check(*arguments)

    monkeypatch.setattr(GradientSketcher, "check", counted)
    model, images = tiny_unet(0), random_images(2)
    store = run(model, images, rs.EvenlySpaced(2), out=tmp_path / "s", batch_size=4)
    task = rs.DiffusionTask(model, SCHEDULER)

    def ask(some: Any = images, out: Any = None) -> int:
        checks.clear()
        rs.sketch(task, some, out, checkpoints={"last": model.state_dict()}, like=store, progress=False)
        return len(checks)

    assert ask() == 0  # as the store's samples were
    assert ask(random_images(1, 5)) == 0
    assert ask(out=tmp_path / "q") == 1
    next(one for one in model.modules() if isinstance(one, torch.nn.Dropout)).train()
    assert [ask(), ask()] == [1, 0]
    model.eval()
    assert [ask(images[:1]), ask()] == [0, 0]


def test_queries_are_sketched_without_measuring_batches_and_weights_are_read_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, reads = tiny_unet(0), []
    weights = {name: value.clone() for name, value in model.state_dict().items()}

    def checkpoint() -> Any:
        reads.append(1)
        return weights

    store = run(model, random_images(6), rs.EvenlySpaced(4), batch_size=16, checkpoints={"last": checkpoint})
    assert len(reads) == 1
    monkeypatch.setattr(calibration, "fastest_batch", None)
    task = rs.DiffusionTask(model, SCHEDULER)
    asked = rs.sketch(task, random_images(2), None, checkpoints={"last": checkpoint}, like=store, progress=False)
    assert (asked.plan["batch_rows"], len(reads)) == (8, 2)
