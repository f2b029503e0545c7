"""Gradients divided before they are projected: Adam's second-moment root."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import retrac_scale as rs
from tests.conftest import random_images, tiny_dit, tiny_unet
from tests.sketching.test_sketching import SCHEDULER, project, run


def trained(model: nn.Module, steps: int = 3, **options: Any) -> tuple[torch.optim.Optimizer, dict[str, list[Any]]]:
    """An Adam after some steps on random gradients, and those gradients."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, **options)
    generator = torch.Generator().manual_seed(0)
    seen: dict[str, list[Any]] = {name: [] for name, _ in model.named_parameters()}
    for _ in range(steps):
        for name, value in model.named_parameters():
            value.grad = torch.randn(value.shape, generator=generator)
            seen[name].append(value.grad.double().clone())
        optimizer.step()
    return optimizer, seen


def flat(divisors: Any) -> Any:
    return torch.cat([value.flatten() for value in divisors.values()])


def test_adam_divisors_are_the_corrected_root_of_the_second_moment() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    optimizer, seen = trained(model, betas=(0.9, 0.95), eps=1e-3)
    found = rs.adam_divisors(model, optimizer.state_dict())
    for name, gradients in seen.items():
        moment: Any = 0
        for gradient in gradients:
            moment = 0.95 * moment + 0.05 * gradient**2
        expected = (moment / (1 - 0.95**3)).sqrt() + 1e-3
        torch.testing.assert_close(found[name].double(), expected, rtol=1e-5, atol=0)
    # one step of Adam without momentum moves the weights by lr x gradient / divisor
    fresh = nn.Linear(3, 4)
    plain = torch.optim.Adam(fresh.parameters(), lr=1e-2, betas=(0.0, 0.9))
    for value in fresh.parameters():
        value.grad = torch.randn(value.shape)
    before = {name: value.detach().clone() for name, value in fresh.named_parameters()}
    plain.step()
    divisors = rs.adam_divisors(fresh, plain.state_dict())
    for name, value in fresh.named_parameters():
        assert value.grad is not None
        torch.testing.assert_close(before[name] - value, 1e-2 * value.grad / divisors[name], rtol=1e-4, atol=1e-7)


def test_in_groups_of_another_order_each_parameter_has_its_own_divisors() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))

    def build() -> torch.optim.Optimizer:
        return torch.optim.AdamW([{"params": model[i].parameters(), "eps": 1 + i} for i in (1, 0)])

    optimizer, loaded = build(), build()
    for value in model.parameters():
        value.grad = torch.randn(value.shape)
    optimizer.step()
    expected = {n: value.grad.abs() + 1 + int(n[0]) for n, value in model.named_parameters() if value.grad is not None}
    torch.testing.assert_close(rs.adam_divisors(model, optimizer), expected)
    state = optimizer.state_dict()
    with pytest.raises(ValueError, match=r"2 groups of parameters without names, .*; give the optimizer itself"):
        rs.adam_divisors(model, state)
    loaded.load_state_dict(state)
    torch.testing.assert_close(rs.adam_divisors(model, loaded), expected)
    for i, group in zip((1, 0), state["param_groups"], strict=True):  # as of an optimizer over named_parameters()
        group["param_names"] = [f"{i}.weight", f"{i}.bias"]
    torch.testing.assert_close(rs.adam_divisors(model, state), expected)


@pytest.mark.parametrize("kind", [torch.optim.NAdam, torch.optim.RAdam, torch.optim.SGD])
def test_what_is_no_adam_is_refused(kind: Any) -> None:
    model = nn.Linear(2, 2)
    optimizer = kind(model.parameters())
    for value in model.parameters():
        value.grad = torch.ones_like(value)
    optimizer.step()
    for given in (optimizer, optimizer.state_dict()):
        with pytest.raises(ValueError, match="parameter 'weight' was not trained by Adam or AdamW of torch"):
            rs.adam_divisors(model, given)


@pytest.mark.usefixtures("small_layers_mixed")
@pytest.mark.parametrize(
    "projection", [rs.Identity(), rs.CountSketch(64), rs.Dense(64), rs.LowRank(4, 64, norm="exact")]
)
@pytest.mark.parametrize("build", [tiny_unet, tiny_dit])
def test_preconditioned_sketches_are_projections_of_divided_gradients(projection: Any, build: Any) -> None:
    model, images = build(), random_images(2)
    divisors = rs.adam_divisors(model, trained(model)[0].state_dict())
    labelled = [(image, 1) for image in images]
    full = run(model, labelled, rs.Explicit([9])).sketches("last")[:, 0]
    store = run(model, labelled, rs.Explicit([9]), projection, precondition={"last": divisors})
    divided = torch.from_numpy(full) / flat(divisors)
    if not isinstance(projection, rs.LowRank):
        expected = project(model, projection, divided)
        scale = float(expected.abs().max())
        torch.testing.assert_close(torch.from_numpy(store.sketches("last")[:, 0]), expected, rtol=0, atol=1e-4 * scale)
    np.testing.assert_allclose(store.norms("last")[:, 0], divided.norm(dim=1), rtol=1e-4)


def test_only_the_training_side_is_preconditioned_and_each_checkpoint_by_its_own(tmp_path: Path) -> None:
    model, images = tiny_unet(), random_images(5)
    states, divisors = {}, {}
    for number, name in enumerate(["a", "b"]):
        optimizer, _ = trained(model, steps=number + 1)
        states[name] = {key: value.clone() for key, value in model.state_dict().items()}
        divisors[name] = rs.adam_divisors(model, optimizer.state_dict())
    options: dict[str, Any] = {"checkpoints": states, "timesteps": rs.Explicit([9])}
    full = run(model, images, **options)
    queries = run(model, images[:2], like=full, **options)
    store = run(model, images, precondition=divisors, out=tmp_path / "s", **options)
    index = rs.build_index(store, rs.TracIn(), tmp_path / "i", dtype="float32")
    expected: Any = 0
    for name in states:
        g, asked = full.sketches(name)[:, 0].astype(np.float64), queries.sketches(name)[:, 0].astype(np.float64)
        expected = expected + asked @ (g / flat(divisors[name]).double().numpy()).T
    np.testing.assert_allclose(index.scores(queries).compute(), expected, atol=1e-4 * np.abs(expected).max())
    again = run(model, images, precondition=divisors, out=tmp_path / "s", **options)
    assert again.revision == store.revision
    with pytest.raises(ValueError, match=r"already holds a different store: fingerprint\.precondition is"):
        run(model, images, out=tmp_path / "s", **options)
    with pytest.raises(ValueError, match=r"cannot grow by this: precondition\.a is"):
        run(model, random_images(6), out=tmp_path / "s", grow=True, **options)
    samples = rs.Samples(images, rs.DiffusionTask(model, SCHEDULER), states, rs.Explicit([9]))
    with pytest.raises(ValueError, match="rerank computes plain gradients"):
        index.query(samples, 2, rerank=3, train=samples)


@pytest.mark.usefixtures("small_layers_mixed")
def test_divisors_that_do_not_fit_are_named_before_any_work() -> None:
    model, images = tiny_unet(), random_images(2)
    divisors = {name: torch.ones_like(value) for name, value in model.named_parameters()}
    first = next(iter(divisors))

    def sketch(changed: Any, projection: Any = None, name: str = "last") -> None:
        run(model, images, rs.Explicit([9]), projection, precondition={name: {**divisors, **changed}})

    with pytest.raises(ValueError, match=rf"precondition\['last'\]: the divisors of '{first}' have shape \(3,\)"):
        sketch({first: torch.ones(3)})
    with pytest.raises(ValueError, match="must be finite and positive"):
        sketch({first: torch.zeros_like(divisors[first])})
    with pytest.raises(ValueError, match=r"LowRank never forms the full gradients .* norm='exact'"):
        sketch({}, rs.LowRank(4, 64))
    with pytest.raises(ValueError, match=r"precondition is given for \['other'\], checkpoints are \['last'\]"):
        sketch({}, name="other")
    optimizer = torch.optim.Adam(model.parameters())
    with pytest.raises(ValueError, match=f"parameter '{first}' of shape .* needs Adam's second moment"):
        rs.adam_divisors(model, optimizer.state_dict())
    with pytest.raises(ValueError, match="the optimizer's state holds 2 parameters"):
        rs.adam_divisors(model, torch.optim.Adam(nn.Linear(2, 2).parameters()).state_dict())
    with pytest.raises(ValueError, match=f"parameter '{first}' of the model is not in the optimizer"):
        rs.adam_divisors(model, torch.optim.Adam(nn.Linear(2, 2).parameters()))


def test_curvature_is_the_empirical_fisher_diagonal_as_it_is_and_in_eigenbases() -> None:
    model, images = tiny_unet(), random_images(6)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    samples = rs.Samples(images, rs.DiffusionTask(model, SCHEDULER), {"last": state}, rs.Explicit([9, 60]))
    full = run(model, images, rs.Explicit([9, 60])).sketches("last").reshape(12, -1).astype(np.float64)
    mean = 0.2 * (full**2).mean()
    found = rs.fisher_divisors(samples, damping=0.2)["last"]
    np.testing.assert_allclose(flat(found), (full**2).mean(0) + mean, rtol=1e-3, atol=1e-4 * mean)
    rotated: Any = rs.kronecker_divisors(samples, damping=0.2)["last"]
    asked = run(model, images[:1], rs.Explicit([30])).sketches("last")[0, 0].astype(np.float64)
    precondition = {"last": rotated}
    solved = run(model, images[:1], rs.Explicit([30]), precondition=precondition).sketches("last")[0, 0]
    start = 0
    for name, value in model.named_parameters():
        part = slice(start, start := start + value.numel())
        g, x = full[:, part].reshape(12, len(value), -1), asked[part].reshape(len(value), -1)
        if value.ndim > 1:
            left, right = rotated[name].left.double().numpy(), rotated[name].right.double().numpy()
            for basis, gram in ((left, g @ g.swapaxes(1, 2)), (right, g.swapaxes(1, 2) @ g)):
                diagonal = basis.T @ gram.mean(0) @ basis
                np.fill_diagonal(diagonal, 0)
                assert np.abs(diagonal).max() < 1e-4 * np.trace(gram.mean(0))
            values = ((left.T @ g @ right) ** 2).mean(0) + mean
            expected = left @ (left.T @ x @ right / values) @ right.T
        else:
            expected = x / ((g**2).mean(0) + mean)
        scale = np.abs(expected).max()
        np.testing.assert_allclose(solved[part], expected.ravel(), rtol=0, atol=1e-3 * scale)
