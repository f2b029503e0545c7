"""The first batch of a sketcher is compared with plain autograd: what would be wrong is refused by name."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import retrac_scale as rs
from retrac_scale.gradients import GradientCapture
from retrac_scale.gradients.graphs import leaves_of
from retrac_scale.gradients.reference import told_apart
from retrac_scale.projections import GradientMismatchError
from tests.oracle import gradient

Refused = (GradientMismatchError, rs.gradients.UncapturableError)


def losses_of(y: Tensor) -> Tensor:
    values: Tensor = y.sin().square().flatten(1).mean(1)
    return values


def sketched(model: nn.Module, x: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    with rs.GradientSketcher(model, rs.Identity(), **options) as sketcher:
        return sketcher(losses_of(model(x)))


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)


class TiedAfter(Small):
    """Uses a weight once more after its layer was called, as a tied head does, by a small share."""

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        return self.second(hidden) + 0.01 * F.linear(hidden.tanh(), self.first.weight)  # type: ignore[no-any-return]


class TiedBefore(Small):
    def forward(self, x: Tensor) -> Tensor:
        return self.second(F.linear(x, self.second.weight).tanh()) + self.first(x)  # type: ignore[no-any-return]


class Centred(Small):
    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        return self.second(hidden - 0.01 * hidden.mean(0))  # type: ignore[no-any-return]


class OnceForAll(Small):
    """Looks positions up once for the whole batch, as many as it has samples."""

    def forward(self, x: Tensor) -> Tensor:
        return self.second(x + self.first(torch.eye(6)[:4]).sum(0))  # type: ignore[no-any-return]


class ByBatchFrequency(Small):
    def __init__(self) -> None:
        super().__init__()
        self.second = nn.Embedding(3, 6, scale_grad_by_freq=True)  # type: ignore[assignment]

    def forward(self, x: Tensor) -> Tensor:
        return self.first(x) + self.second(torch.tensor([0, 1, 1, 1]))  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("model", "name"),
    [
        (TiedAfter(), r"first\.weight"),
        (TiedBefore(), r"second\.weight"),
        (Centred(), r"first\.weight"),
        (OnceForAll(), r"first\.weight"),
        (ByBatchFrequency(), r"second\.weight"),
    ],
)
def test_what_would_be_wrong_in_silence_is_refused_by_name(model: nn.Module, name: str) -> None:
    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    with pytest.raises(Refused, match=name):
        sketched(model, x)


def test_samples_along_another_axis_are_refused_by_the_names_of_their_layer() -> None:
    class Flipped(Small):
        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.first(x).transpose(0, 1)).transpose(0, 1)  # type: ignore[no-any-return]

    with pytest.raises(GradientMismatchError, match=r"differ in second\.weight, second\.bias \("):
        sketched(Flipped(), torch.randn(4, 8, 6))


def test_a_penalty_on_the_weights_in_the_losses_is_seen() -> None:
    model = Small()
    with rs.GradientSketcher(model, rs.CountSketch(32)) as sketcher:
        y = model.second(model.first(torch.randn(3, 6)))
        with pytest.raises(GradientMismatchError, match=r"first\.weight"):
            sketcher(losses_of(y) + 0.1 * model.first.weight.square().sum())


def test_losses_that_mix_samples_are_refused() -> None:
    model = nn.Linear(6, 6)
    with (
        rs.GradientSketcher(model, rs.Identity()) as sketcher,
        pytest.raises(GradientMismatchError, match="samples meet"),
    ):
        sketcher(torch.log_softmax(model(torch.randn(4, 6)), 0).mean(1))


@pytest.mark.parametrize("projection", [rs.Identity(), rs.CountSketch(64), rs.LowRank(4, 64), rs.Dense(16)])
@pytest.mark.usefixtures("small_layers_mixed")
def test_the_checked_batch_gives_the_same_sketches_as_later_ones_and_leaves_no_gradients(projection: Any) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 16, 3),
        nn.GroupNorm(4, 16),
        nn.SiLU(inplace=True),
        nn.Conv2d(16, 4, 3),
        nn.Flatten(2),
        nn.Linear(4, 3),
    )
    model[0].weight.grad = torch.ones(16, 2, 3, 3)
    x = torch.randn(5, 2, 6, 6)
    with rs.GradientSketcher(model, projection) as sketcher:
        first = sketcher(losses_of(model(x)))
        losses = losses_of(model(x))
        assert set(model.parameters()).isdisjoint(leaves_of(losses))
        second = sketcher(losses)
    for one, other in zip(first, second, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)
    assert torch.equal(model[0].weight.grad, torch.ones(16, 2, 3, 3))
    assert all(p.grad is None for p in list(model.parameters())[1:])
    assert all(p.requires_grad for p in model.parameters())


def test_a_batch_of_one_shows_part_of_it_and_the_first_of_several_the_rest() -> None:
    model, x = Centred(), torch.randn(4, 6)
    sketcher = rs.GradientSketcher(model, rs.CountSketch(16))
    for _ in range(2):
        with sketcher:
            sketcher(losses_of(model(x[:1])))
    for _ in range(2):  # a check that failed does not count
        with sketcher, pytest.raises(GradientMismatchError):
            sketcher(losses_of(model(x)))


def test_two_functions_of_the_forward_pass_that_is_checked() -> None:
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
    x = torch.randn(3, 6)
    with rs.GradientSketcher(model, rs.Identity()) as sketcher:
        values = losses_of(model(x))
        tripled, _ = sketcher(3 * values, retain_graph=True)
        sketch, _ = sketcher(values)
        again, _ = sketcher(losses_of(model(x)))
    torch.testing.assert_close(tripled, 3 * sketch)
    torch.testing.assert_close(again, sketch)


@pytest.mark.parametrize("tie", [0.0, 0.1])
def test_under_autocast_a_tied_weight_is_told_from_rounding(tie: float) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.conv, self.norm, self.inner, self.out = (
                nn.Conv2d(2, 16, 3, padding=1),
                nn.GroupNorm(4, 16),
                nn.Linear(16, 16),
                nn.Conv2d(16, 2, 3),
            )

        def forward(self, x: Tensor) -> Tensor:
            hidden = self.inner(self.norm(self.conv(x)).movedim(1, -1))
            hidden = hidden + tie * F.linear(hidden.tanh(), self.inner.weight)
            return self.out(hidden.movedim(-1, 1))  # type: ignore[no-any-return]

    model, x = Net(), torch.randn(6, 2, 8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        if tie:
            with pytest.raises(GradientMismatchError, match=r"differ in inner\.weight \("):
                sketched(model, x)
        else:
            sketched(model, x)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_weights_of_any_precision_pass_and_are_what_autograd_has(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.SiLU(), nn.Conv2d(8, 4, 3), nn.Flatten(), nn.Linear(64, 5)
    ).to(dtype)
    x = torch.randn(4, 2, 6, 6).to(dtype)
    found, _ = sketched(model, x)
    for sample in range(4):
        expected = gradient(model, losses_of(model(x[sample : sample + 1])).sum())
        off = (found[sample].double() - expected.double()).norm() / expected.double().norm()
        assert float(off) < (1e-6 if dtype == torch.float64 else 2e-2)


def test_a_projection_whose_norms_or_sketches_are_wrong_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = nn.Linear(6, 3), torch.randn(4, 6)
    for factor, what in (((1, 1.001), "norms by"), ((1.1, 1), "their sketches by")):
        sketcher = rs.GradientSketcher(model, rs.Identity())
        add, calls = sketcher._projector.add, []

        def wrong(accumulator: Tensor, name: str, whole: Tensor, factor: Any = factor, add: Any = add) -> Any:
            if len(accumulator) == 1:
                return add(accumulator, name, whole)
            calls.append(name)  # noqa: B023
            return factor[1] ** 2 * add(accumulator, name, factor[0] * whole) / factor[0] ** 2

        monkeypatch.setattr(sketcher._projector, "add", wrong)
        with sketcher, pytest.raises(GradientMismatchError, match=what):
            sketcher(losses_of(model(x)))
        assert calls


def test_factors_are_exact_in_every_float_and_tell_the_first_samples_apart() -> None:
    for n in (1, 2, 3, 64):
        factors = told_apart(n)
        assert torch.equal(factors.bfloat16().double(), factors.double())
        assert torch.equal(factors, told_apart(n))
        assert n == 1 or factors[0] != factors[1]
        assert float(factors.sum().abs()) >= 0.5 * float(factors.norm())


def test_fisher_divisors_stand_on_the_same_check(scheduler: Any) -> None:
    class Meeting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Conv2d(1, 1, 3, padding=1)

        def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
            return self.inner(x + 0.1 * self.inner(x).mean(0))  # type: ignore[no-any-return]

    model = Meeting()
    task = rs.DiffusionTask(model, scheduler)
    samples = rs.Samples(torch.randn(4, 1, 4, 4), task, {"a": copy.deepcopy(model.state_dict())}, rs.Explicit([3]))
    for divisors in (rs.fisher_divisors, rs.kronecker_divisors):
        make: Callable[[Any], Any] = divisors
        with pytest.raises(GradientMismatchError, match=r"inner\.weight"):
            make(samples)


def test_a_capture_without_check_is_left_as_fast_as_it_was() -> None:
    model = nn.Linear(3, 2)
    with GradientCapture(model) as capture:
        losses = losses_of(model(torch.randn(3, 3)))
        assert set(model.parameters()).isdisjoint(leaves_of(losses))
        assert capture.backward(losses, lambda *given: None) is None
