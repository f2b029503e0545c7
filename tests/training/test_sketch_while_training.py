"""Sketches out of the training step's own backward pass: equal to a replay's, and nothing else changes."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import retrac_scale as rs
from retrac_scale.projections.live import LiveSketcher
from tests.conftest import tiny_dit, tiny_unet
from tests.oracle import gradient
from tests.small_denoiser import SCHEDULER, SmallDenoiser, images

N, BATCH = 8, 4


def clean(model: nn.Module) -> torch.Tensor:
    return F.interpolate(images(N), size=8) if hasattr(model, "config") else images(N)


def conditioning(model: nn.Module, ids: Any) -> dict[str, torch.Tensor]:
    return {"class_labels": torch.as_tensor(ids) % 10} if type(model).__name__.startswith("DiT") else {}


def loss_of(model: nn.Module, ids: Any, steps: torch.Tensor, seed: int) -> torch.Tensor:
    """`[n]`."""
    x = clean(model)[ids]
    noise = rs.draw_noise(x.shape[1:], ids, steps, seed)
    noisy = SCHEDULER.add_noise(x, noise, steps)
    predicted = model(noisy, steps, **conditioning(model, ids), return_dict=False)[0]
    losses: torch.Tensor = (predicted - noise).square().flatten(1).mean(1)
    return losses


def train(model: nn.Module, recorder: rs.TrainingRecorder | None, first: int, last: int) -> list[Any]:
    """Plain SGD with a changing learning rate; gives the weights before each step, and what it was made of."""
    before = []
    for step in range(first, last):
        epoch, place = divmod(step, N // BATCH)
        rng = np.random.default_rng(epoch)
        ids = rng.permutation(N)[place * BATCH : (place + 1) * BATCH]
        steps, lr = torch.from_numpy(rng.integers(0, 100, N)[place * BATCH :][:BATCH]), 0.1 / (1 + step)
        before.append(({name: p.detach().clone() for name, p in model.state_dict().items()}, ids, steps, step, lr))
        model.zero_grad()
        torch.autograd.backward(loss_of(model, ids, steps, step).mean())
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter.sub_(lr * parameter.grad)
        if recorder is not None:
            recorder.step(ids, steps, step, lr)
    return before


def replayed(build: Any, projection: Any, before: list[Any]) -> tuple[Any, Any]:
    """Sketches `[step, batch, k]` and norms of the same steps, by a sketcher with frozen weights."""
    model, found = build(), []
    for weights, ids, steps, seed, _ in before:
        model.load_state_dict(weights)
        with rs.GradientSketcher(model, projection) as sketcher:
            found.append(sketcher(loss_of(model, ids, steps, seed)))
    return np.stack([s.numpy() for s, _ in found]), np.stack([n.numpy() for _, n in found])


@pytest.mark.usefixtures("small_layers_mixed")
@pytest.mark.parametrize("build", [tiny_unet, tiny_dit])
@pytest.mark.parametrize("projection", [rs.LowRank(4, 256), rs.CountSketch(256)])
def test_sketches_equal_a_replay_and_the_training_is_what_it_was_without(
    tmp_path: Path, build: Any, projection: Any
) -> None:
    model = build().train()
    options: dict[str, Any] = {
        "sketch": projection,
        "store": tmp_path / "store.zarr",
        "model": model,
        "dtype": "float32",
    }
    recorder = rs.TrainingRecorder(tmp_path / "recorded", N, SCHEDULER, **options)
    before = train(model, recorder, 0, 4)
    recorder.checkpoint("last")
    plain = build().train()
    train(plain, None, 0, 4)
    assert all(torch.equal(value, plain.state_dict()[name]) for name, value in model.state_dict().items())
    store = rs.open_store(tmp_path / "store.zarr")
    assert store.is_complete
    sketches, norms = replayed(lambda: build().train(), projection, before)
    for step in (2, 3):  # the last visit of every sample
        ids = before[step][1]
        found, expected = store.sketches("last")[ids, 0], sketches[step]
        assert np.linalg.norm(found - expected) <= 1e-4 * np.linalg.norm(expected)
        np.testing.assert_allclose(store.norms("last")[ids, 0], norms[step], rtol=1e-4)
        assert store.timesteps("last")[ids, 0].tolist() == before[step][2].tolist()
    assert store.weights["last"] == pytest.approx(sum(b[4] for b in before) * BATCH / N)


def test_summed_sketches_times_the_weight_make_up_the_weight_change_between_two_checkpoints(tmp_path: Path) -> None:
    model = tiny_unet().train()
    options: dict[str, Any] = {"sketch": rs.Identity(), "store": tmp_path / "s.zarr", "model": model, "visits": "sum"}
    recorder = rs.TrainingRecorder(tmp_path / "recorded", N, SCHEDULER, dtype="float32", **options)
    train(model, recorder, 0, 3)
    recorder.checkpoint("a")
    at_a = nn.utils.parameters_to_vector(model.parameters()).detach()
    train(model, recorder, 3, 8)
    recorder.checkpoint("b")
    moved = (nn.utils.parameters_to_vector(model.parameters()).detach() - at_a).numpy()
    store = rs.open_store(tmp_path / "s.zarr")
    assert store.checkpoints == ["a", "b"]
    summed = -store.weights["b"] * store.sketches("b")[:, 0].sum(0) / BATCH
    assert np.linalg.norm(moved) > 0
    assert np.linalg.norm(summed - moved) <= 1e-3 * np.linalg.norm(moved)


@pytest.mark.usefixtures("small_layers_mixed")
def test_the_store_is_queried_like_any_other(tmp_path: Path) -> None:
    model = tiny_unet().train()
    options: dict[str, Any] = {
        "sketch": rs.LowRank(4, 256),
        "store": tmp_path / "store.zarr",
        "model": model,
        "visits": 2,
    }
    recorder = rs.TrainingRecorder(tmp_path / "recorded", N, SCHEDULER, **options)
    checkpoints = {}
    for name, first, last in (("a", 0, 4), ("b", 4, 8)):
        train(model, recorder, first, last)
        recorder.checkpoint(name)
        checkpoints[name] = {key: value.clone() for key, value in model.state_dict().items()}
    store = rs.open_store(tmp_path / "store.zarr")
    assert store.shape == (N, 2, 256)
    task = rs.DiffusionTask(tiny_unet(), SCHEDULER)
    queries = rs.sketch(
        task,
        clean(model)[:2],
        None,
        checkpoints=checkpoints,
        timesteps=rs.EvenlySpaced(3),
        like=store,
        batch_size=6,
        progress=False,
    )
    answer = rs.build_index(store, rs.ReTrac(), None).query(queries, k=3)
    assert answer.ids.shape == (2, 3)


def test_visits_that_were_not_made_are_zero_and_the_last_ones_are_kept_in_order(tmp_path: Path) -> None:
    model = SmallDenoiser()
    options: dict[str, Any] = {
        "sketch": rs.Identity(),
        "store": tmp_path / "s.zarr",
        "model": model,
        "visits": 2,
        "dtype": "float32",
    }
    recorder = rs.TrainingRecorder(tmp_path / "recorded", N, SCHEDULER, **options)
    for step, ids in enumerate([[0, 1, 2], [0, 1], [0]]):
        steps = torch.full((len(ids),), 10 + step)
        torch.autograd.backward(loss_of(model, ids, steps, 0).mean())
        recorder.step(ids, steps, 0, 0.1)
    recorder.checkpoint("a")
    store = rs.open_store(tmp_path / "s.zarr")
    assert store.timesteps("a")[:4].tolist() == [[11, 12], [10, 11], [-1, 10], [-1, -1]]
    assert (store.norms("a")[:4] > 0).tolist() == [[True, True], [True, True], [False, True], [False, False]]
    assert not store.sketches("a")[3].any()


def test_accumulated_and_scaled_losses_are_undone(tmp_path: Path) -> None:
    model = SmallDenoiser()
    options: dict[str, Any] = {
        "sketch": rs.Identity(),
        "store": tmp_path / "s.zarr",
        "model": model,
        "dtype": "float32",
    }
    recorder = rs.TrainingRecorder(tmp_path / "recorded", N, SCHEDULER, **options)
    halves = ([0, 1, 2], [3, 4])
    reductions: Any = (torch.mean, torch.clone)
    for ids, reduce in zip(halves, reductions, strict=True):
        steps = torch.full((len(ids),), 20)
        loss = reduce(loss_of(model, ids, steps, 5))
        recorder.batch(ids, steps, 5, loss=loss)
        torch.autograd.backward(loss.sum() / 2 * 1024)
    recorder.update(0.1)
    recorder.checkpoint("a")
    store = rs.open_store(tmp_path / "s.zarr")
    for sample in range(5):
        loss = loss_of(model, [sample], torch.tensor([20]), 5).sum()
        expected = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))]).numpy()
        assert np.linalg.norm(store.sketches("a")[sample, 0] - expected) <= 1e-5 * np.linalg.norm(expected)


def test_a_share_of_the_steps_is_sketched_and_sums_are_scaled_up(tmp_path: Path) -> None:
    sums = {}
    for share in (1.0, 0.5):
        model, folder = SmallDenoiser(), tmp_path / str(share)
        options: dict[str, Any] = {"sketch": rs.Identity(), "store": folder / "s.zarr", "model": model, "visits": "sum"}
        recorder = rs.TrainingRecorder(folder, N, SCHEDULER, share=share, dtype="float32", **options)
        for _ in range(200):
            torch.autograd.backward(loss_of(model, [0], torch.tensor([30]), 1).mean())
            recorder.step([0], [30], 1, 0.1)
        recorder.checkpoint("a")
        sums[share] = rs.open_store(folder / "s.zarr").sketches("a")[0, 0]
    taken = np.linalg.norm(sums[0.5]) / np.linalg.norm(sums[1.0])
    assert taken != 1
    assert abs(taken - 1) < 4 * 200**-0.5
    assert np.dot(sums[0.5], sums[1.0]) == pytest.approx(np.linalg.norm(sums[0.5]) * np.linalg.norm(sums[1.0]))


def test_a_resumed_training_replaces_the_checkpoints_it_went_back_before(tmp_path: Path) -> None:
    def recorder(model: nn.Module) -> rs.TrainingRecorder:
        options: dict[str, Any] = {"sketch": rs.CountSketch(64), "store": tmp_path / "s.zarr", "model": model}
        return rs.TrainingRecorder(tmp_path / "recorded", N, SCHEDULER, **options)

    model = SmallDenoiser()
    first = recorder(model)
    for name, start in (("a", 0), ("b", 2), ("c", 4)):
        train(model, first, start, start + 2)
        first.checkpoint(name)
    first.close()
    assert not any(layer._forward_hooks or layer._forward_pre_hooks for layer in model.modules())
    held = rs.open_store(tmp_path / "s.zarr").sketches("a")
    model = SmallDenoiser(1)
    second = recorder(model)
    second.restart("a")
    train(model, second, 2, 4)
    assert rs.open_store(tmp_path / "s.zarr").checkpoints == ["a"]
    second.checkpoint("b")
    store = rs.open_store(tmp_path / "s.zarr")
    assert store.checkpoints == ["a", "b"]
    assert store.is_complete
    np.testing.assert_array_equal(store.sketches("a"), held)
    with pytest.raises(ValueError, match="would take every checkpoint out of the store"):
        recorder(model).restart(1)
    with pytest.raises(ValueError, match="would leave the steps from 5 on out of the sketches"):
        recorder(model).restart(6)
    with pytest.raises(ValueError, match="holds a store already"):
        rs.TrainingRecorder(
            tmp_path / "other", N, SCHEDULER, sketch=rs.CountSketch(64), store=tmp_path / "s.zarr", model=model
        )


class Tied(SmallDenoiser):
    """Uses a parameter outside its own layer's forward."""

    def forward(self, noisy: torch.Tensor, timesteps: torch.Tensor, return_dict: bool = True) -> Any:
        return (super().forward(noisy, timesteps)[0] * (1 + self.time.weight.mean()),)


def test_what_cannot_be_sketched_is_said_at_the_first_step(tmp_path: Path) -> None:
    model: nn.Module = Tied()
    options: dict[str, Any] = {"sketch": rs.CountSketch(64), "model": model}
    with pytest.raises(ValueError, match="needs store="):
        rs.TrainingRecorder(tmp_path / "recorded", N, SCHEDULER, **options)
    recorder = rs.TrainingRecorder(tmp_path / "recorded", N, SCHEDULER, store=tmp_path / "s.zarr", **options)
    with pytest.raises(rs.projections.GradientMismatchError, match=r"they differ in time\.weight"):
        train(model, recorder, 0, 1)
    model = SmallDenoiser()
    options["model"] = model
    recorder = rs.TrainingRecorder(tmp_path / "recorded", N, SCHEDULER, store=tmp_path / "s.zarr", **options)
    torch.autograd.backward(loss_of(model, [0, 1], torch.tensor([1, 2]), 0).mean())
    with pytest.raises(ValueError, match=r"batches of \[1\] samples, but backward passes over \[2\] were sketched"):
        recorder.step([0], [1], 0, 0.1)


@pytest.mark.usefixtures("small_layers_mixed")
def test_activation_checkpointing_gives_the_same_sketches(tmp_path: Path) -> None:
    found = []
    for checkpointing in (False, True):
        model = tiny_unet().train()
        if checkpointing:
            model.enable_gradient_checkpointing()  # type: ignore[operator]
        folder = tmp_path / str(checkpointing)
        options: dict[str, Any] = {
            "sketch": rs.LowRank(4, 256),
            "store": folder / "s.zarr",
            "model": model,
            "dtype": "float32",
        }
        recorder = rs.TrainingRecorder(folder, N, SCHEDULER, **options)
        train(model, recorder, 0, 2)
        recorder.checkpoint("a")
        found.append(rs.open_store(folder / "s.zarr").sketches("a"))
    assert np.linalg.norm(found[1] - found[0]) <= 1e-5 * np.linalg.norm(found[0])


def test_the_loss_and_its_weighting_are_part_of_what_was_measured(tmp_path: Path) -> None:
    model = SmallDenoiser()
    options: Any = {"sketch": rs.CountSketch(8), "model": model, "measure": rs.Huber(), "weighting": rs.MinSNR()}
    recorder = rs.TrainingRecorder(tmp_path / "run", N, SCHEDULER, store=tmp_path / "store", **options)
    train(model, recorder, 0, 2)
    recorder.checkpoint("last")
    task = rs.DiffusionTask(model, SCHEDULER, measure=rs.Huber(), weighting=rs.MinSNR())
    assert rs.open_store(tmp_path / "store").fingerprint["measure"] == task.measure
    for wrong in ({"measure": "mean_output"}, {"measure": "huber"}, {"weighting": rs.SD3Weighting()}):
        with pytest.raises(ValueError, match=r"the loss in training must be|not of diffusion"):
            rs.TrainingRecorder(tmp_path / "other", N, SCHEDULER, store=tmp_path / "new", **{**options, **wrong})


class Rows(nn.Module):
    def __init__(self, meet: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.gain, self.last = nn.Linear(6, 6), nn.PReLU(6), nn.Linear(6, 3)
        self.meet = meet

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.first(x)
        return self.last(self.gain(hidden + self.meet * hidden.mean(0)))  # type: ignore[no-any-return]


def test_layers_without_a_rule_are_sketched_while_training_as_autograd_has_them() -> None:
    model, x = Rows(), torch.randn(4, 6)
    sketcher = LiveSketcher(model, rs.Identity())
    sketcher.recording = True
    for _ in range(2):
        torch.autograd.backward(model(x).sin().square().mean(1).sum())
    assert len(sketcher.passes) == 2
    for sketch, _norm in sketcher.passes:
        for sample in range(4):
            reference = Rows().double()
            expected = gradient(reference, reference(x[sample : sample + 1].double()).sin().square().mean())
            torch.testing.assert_close(sketch[sample].double(), expected, rtol=1e-4, atol=1e-6)


def test_samples_that_meet_are_found_though_their_sketches_add_up() -> None:
    model = Rows(meet=0.05)
    sketcher = LiveSketcher(model, rs.Identity())
    sketcher.recording = True
    with pytest.raises(rs.projections.GradientMismatchError, match=r"first\.weight, first\.bias"):
        torch.autograd.backward(model(torch.randn(4, 6)).sin().square().mean(1).sum())


def test_the_check_leaves_the_steps_own_gradients_alone() -> None:
    model, plain, x = Rows(), Rows(), torch.randn(4, 6)
    sketcher = LiveSketcher(model, rs.CountSketch(16))
    sketcher.recording = True
    for one in (model, plain):
        torch.autograd.backward(one(x).sin().square().mean())
    for found, expected in zip(model.parameters(), plain.parameters(), strict=True):
        assert found.grad is not None
        assert expected.grad is not None
        assert torch.equal(found.grad, expected.grad)


def test_a_model_called_on_its_own_output_is_said_not_to_be_checked_by_sample() -> None:
    class Square(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(6, 6)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner(x)  # type: ignore[no-any-return]

    model = Square()
    sketcher = LiveSketcher(model, rs.Identity())
    sketcher.recording = True
    with pytest.warns(UserWarning, match="not checked sample by sample"):
        torch.autograd.backward(model(model(torch.randn(4, 6))).sin().square().mean(1).sum())
    assert len(sketcher.passes) == 1


def test_a_watched_model_can_be_copied_and_its_copy_is_not_watched() -> None:
    model, x = Rows(), torch.randn(4, 6)
    sketcher = LiveSketcher(model, rs.CountSketch(16))
    sketcher.recording = True
    values = model(x).sin().square().mean(1)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.autograd.backward(other(x).square().sum())
    assert not sketcher.passes
    torch.autograd.backward(values.sum())
    assert len(sketcher.passes) == 1


class Owner(SmallDenoiser):
    """Has a parameter of its own beside those of its layers."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.full((1,), 1.5))

    def forward(self, noisy: torch.Tensor, timesteps: torch.Tensor, return_dict: bool = True) -> Any:
        return (super().forward(noisy, timesteps)[0] * self.scale,)


def test_a_parameter_of_the_model_itself_is_sketched_while_training(tmp_path: Path) -> None:
    model = Owner()
    options: dict[str, Any] = {"sketch": rs.Identity(), "store": tmp_path / "s.zarr", "model": model}
    recorder = rs.TrainingRecorder(tmp_path / "recorded", N, SCHEDULER, dtype="float32", **options)
    before = train(model, recorder, 0, 4)
    recorder.checkpoint("last")
    store = rs.open_store(tmp_path / "s.zarr")
    for weights, ids, steps, seed, _ in before[2:]:
        model.load_state_dict(weights)
        for place, sample in enumerate(ids):
            loss = loss_of(model, [sample], steps[place : place + 1], seed).sum()
            expected = gradient(model, loss).numpy()
            assert np.linalg.norm(store.sketches("last")[sample, 0] - expected) <= 1e-4 * np.linalg.norm(expected)


def test_a_model_that_is_checkpointed_as_a_whole_is_sketched_while_training() -> None:
    model, x = Rows(), torch.randn(4, 6)
    sketches = []
    runs: Any = model, lambda x: checkpoint(model, x, use_reentrant=False)
    for run in runs:
        sketcher = LiveSketcher(model, rs.Identity())
        sketcher.recording = True
        torch.autograd.backward(run(x).sin().square().mean(1).sum())
        sketches.append(sketcher.passes[0][0])
        sketcher.detach()
    torch.testing.assert_close(*sketches)


def test_a_backward_pass_that_failed_is_forgotten_at_the_next_forward_pass() -> None:
    model, x = Rows(), torch.randn(4, 6)
    sketcher = LiveSketcher(model, rs.Identity())
    sketcher.recording = True

    def fail(grad: torch.Tensor) -> None:
        raise KeyError("stopped")

    given = x.clone().requires_grad_()
    given.register_hook(fail)  # type: ignore[no-untyped-call]
    with pytest.raises(KeyError, match="stopped"):
        torch.autograd.backward(model(given).sum())
    torch.autograd.backward(model(x).sin().square().mean(1).sum())
    assert len(sketcher.passes) == 1


def test_a_graph_made_before_the_model_was_left_alone_is_not_sketched() -> None:
    model = Rows()
    sketcher = LiveSketcher(model, rs.Identity())
    sketcher.recording = True
    loss = model(torch.randn(4, 6)).sum()
    sketcher.detach()
    torch.autograd.backward(loss)
    assert not sketcher.passes


def test_a_recorder_rests_while_its_model_is_sketched_otherwise(tmp_path: Path) -> None:
    stores = []
    for meanwhile in (False, True):
        model, folder = SmallDenoiser(), tmp_path / str(meanwhile)
        options: dict[str, Any] = {"sketch": rs.CountSketch(64), "store": folder / "s.zarr", "model": model}
        recorder = rs.TrainingRecorder(folder, N, SCHEDULER, dtype="float32", **options)
        for step in range(3):
            if meanwhile:
                sketch_otherwise(model)
            train(model, recorder, step, step + 1)
        recorder.checkpoint("a")
        stores.append(rs.open_store(folder / "s.zarr").sketches("a"))
    np.testing.assert_array_equal(stores[0], stores[1])


def sketch_otherwise(model: nn.Module) -> None:
    with rs.GradientSketcher(model, rs.CountSketch(16)) as sketcher:
        for _ in range(2):
            sketcher(loss_of(model, [0, 1], torch.tensor([5, 6]), 0))
    task = rs.DiffusionTask(model, SCHEDULER)
    rs.check_model(task, list(images(2)))
    given: dict[str, Any] = {"checkpoints": {"now": copy.deepcopy(model.state_dict())}, "timesteps": rs.EvenlySpaced(2)}
    rs.sketch(task, images(N), None, projection=rs.CountSketch(16), progress=False, **given)
