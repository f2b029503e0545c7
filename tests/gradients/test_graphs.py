"""What sketching does to autograd's graphs, and asks of them: several at a time, freed ones, checkpointed ones."""

from __future__ import annotations

import copy
import gc

import pytest
import torch
from torch import Tensor, nn

import retrac_scale as rs
from retrac_scale.gradients.layers import Call
from retrac_scale.projections.live import LiveSketcher
from tests.oracle import gradient


def losses_of(y: Tensor) -> Tensor:
    values: Tensor = y.sin().square().flatten(1).mean(1)
    return values


def by_autograd(model: nn.Module, x: Tensor) -> Tensor:
    """Gradients `[n, p]`, one sample at a time in float64."""
    reference = copy.deepcopy(model).double()
    each = [gradient(reference, losses_of(reference(one[None])).sum()) for one in x.double()]
    return torch.stack(each).float()


def small() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.PReLU(5), nn.Linear(5, 3))


def rows(seed: int = 0) -> Tensor:
    return torch.randn(4, 6, generator=torch.Generator().manual_seed(seed))


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def calls_in_memory() -> int:
    gc.collect()
    return sum(type(one) is Call for one in gc.get_objects())


@pytest.mark.parametrize("check", [True, False])
def test_forward_passes_are_sketched_in_any_order(check: bool) -> None:
    model = small()
    expected = [by_autograd(model, rows(seed)) for seed in range(3)]
    with rs.GradientSketcher(model, rs.Identity(), check=check) as sketcher:
        for order in ((0, 1, 2), (2, 0, 1)):
            losses = [losses_of(model(rows(seed))) for seed in range(3)]
            for seed in order:
                close(sketcher(losses[seed])[0], expected[seed])


def test_training_passes_are_sketched_in_any_order_and_as_often_as_they_are_made() -> None:
    model = small()
    expected = [by_autograd(model, rows(seed)) for seed in range(2)]
    sketcher = LiveSketcher(model, rs.Identity())
    sketcher.recording = True
    losses = [losses_of(model(rows(seed))).sum() for seed in range(2)]
    for seed in (1, 0, 0):
        torch.autograd.backward(losses[seed], retain_graph=True)
        close(sketcher.passes.pop()[0], expected[seed])


def test_what_nobody_differentiates_is_freed_with_its_graph() -> None:
    model = small()
    sketcher, before = rs.GradientSketcher(model, rs.CountSketch(16)), calls_in_memory()
    with sketcher:
        for _ in range(2):
            model(rows())
            sketcher(losses_of(model(rows())), retain_graph=True)
            assert calls_in_memory() == before


def test_a_validation_with_gradients_is_freed_while_training_is_sketched() -> None:
    model = small()
    sketcher, before = LiveSketcher(model, rs.CountSketch(16)), calls_in_memory()
    sketcher.recording = True
    torch.autograd.backward(losses_of(model(rows())).mean())
    model(rows())
    assert calls_in_memory() == before
    sketcher.detach()
