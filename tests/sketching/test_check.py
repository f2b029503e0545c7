"""What check_model says of models: covered, slow, refused, wrong."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import retrac_scale as rs
from tests.conftest import random_images, tiny_unet


class Scaled(nn.Module):
    """A table of its own beside a layer with a rule."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)
        self.table = nn.Parameter(torch.ones(4))
        self.idle = nn.Parameter(torch.ones(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) * self.table  # type: ignore[no-any-return]


def test_shares_tell_rules_from_the_per_sample_fallback_and_count_what_the_example_does_not_reach() -> None:
    check = rs.check_model(Scaled(), torch.randn(3, 5, 4))
    assert check.exact
    assert check.share("linear") == pytest.approx(20 / 26)
    assert check.share("per-sample autograd") == pytest.approx(6 / 26)
    assert [p.name for p in check.parameters if not p.reached] == ["idle"]
    assert "7.7% of them have no gradient in the example" in str(check)


def test_parameters_left_out_are_counted_as_frozen() -> None:
    check = rs.check_model(Scaled(), {"x": torch.randn(3, 4)}, parameters=["inner.*"])
    assert {p.name for p in check.parameters} == {"inner.weight", "inner.bias"}
    assert check.frozen == 6


def test_a_parameter_used_around_its_layer_is_refused_and_the_others_still_compared() -> None:
    class Around(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.first(x) @ self.second.weight  # type: ignore[no-any-return]

    check = rs.check_model(Around(), torch.randn(3, 4))
    assert not check.exact
    assert {p.name: p.rule for p in check.parameters} == {
        "first.weight": "linear",
        "first.bias": "linear",
        "second.weight": "refused",
        "second.bias": "linear",
    }
    assert "refused: parameter 'second.weight' is used outside its own layer" in str(check)


def test_a_wrong_rule_is_found_and_named() -> None:
    class Doubled(nn.Linear):
        pass

    def rule(layer: nn.Module, activation: Tensor, grad: Tensor, n: int) -> dict[str, Tensor]:
        return {"weight": 2 * torch.einsum("no,ni->noi", grad, activation), "bias": grad}

    rs.gradients.register(Doubled, rule)
    check = rs.check_model(nn.Sequential(nn.Linear(3, 3), Doubled(3, 2)), torch.randn(2, 3))
    assert [p.name for p in check.wrong] == ["1.weight"]
    assert check.wrong[0].error == pytest.approx(1, rel=1e-4)
    assert "wrong: 1.weight (Doubled, rule) is off by 1.0e+00" in str(check)


def test_samples_laid_out_along_another_axis_are_found() -> None:
    class SequenceFirst(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x.transpose(0, 1)).transpose(0, 1)  # type: ignore[no-any-return]

    check = rs.check_model(SequenceFirst(), torch.randn(2, 6, 4))
    assert {p.name for p in check.wrong} == {"layer.weight", "layer.bias"}


def test_samples_that_meet_are_refused() -> None:
    class Mean(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x - x.mean(0))

    with pytest.raises(ValueError, match="alone gives another output than among the 3"):
        rs.check_model(Mean(4, 4), torch.randn(3, 4))


def test_one_sample_shows_nothing() -> None:
    with pytest.raises(ValueError, match="two or more, got 1"):
        rs.check_model(nn.Linear(4, 4), torch.randn(1, 4))


def test_a_task_is_checked_on_dataset_items_and_left_as_it_was(scheduler: object) -> None:
    task = rs.DiffusionTask(tiny_unet(), scheduler)
    before = {name: value.clone() for name, value in task.model.state_dict().items()}
    check = rs.check_model(task, list(random_images(2)))
    assert check.exact
    assert check.samples == 4
    assert sum(check.share(rule) for rule in check.rules) == pytest.approx(1)
    assert all(torch.equal(value, before[name]) for name, value in task.model.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in task.model.parameters())
