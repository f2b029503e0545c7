"""What sketching does to autograd's graphs, and asks of them: several at a time, freed ones, checkpointed ones."""

from __future__ import annotations

import copy
import gc
from typing import Any

import peft
import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import retrac_scale as rs
from retrac_scale.gradients.layers import Call
from retrac_scale.projections.live import LiveSketcher
from tests.conftest import CONDITIONAL, random_images, tiny_dit, tiny_unet
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


class Checkpointed(nn.Module):
    """Computes once more what lies between a frozen layer, or nothing, and the last one."""

    def __init__(self, first: nn.Module) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = first.requires_grad_(False), nn.Linear(6, 3)
        self.middle = nn.Sequential(nn.Conv1d(6, 6, 1), nn.GroupNorm(2, 6), nn.SiLU(), nn.PReLU(6), nn.Conv1d(6, 6, 1))

    def forward(self, x: Tensor) -> Tensor:
        hidden = checkpoint(self.middle, self.first(x), use_reentrant=False)
        return self.last(hidden.mT)  # type: ignore[no-any-return]


@pytest.mark.parametrize("first", [nn.Identity(), nn.Conv1d(6, 6, 1)], ids=["input", "frozen layer"])
@pytest.mark.parametrize("check", [True, False])
def test_activation_checkpointing_below_what_needs_no_gradient_equals_autograd(first: nn.Module, check: bool) -> None:
    model, x = Checkpointed(first), torch.randn(4, 6, 5, generator=torch.Generator().manual_seed(0))
    expected = by_autograd(model, x)
    with rs.GradientSketcher(model, rs.Identity(), check=check) as sketcher:
        for _ in range(3):
            losses = losses_of(model(x))
            close(sketcher(2 * losses, retain_graph=True)[0], 2 * expected)
            close(sketcher(losses)[0], expected)


def conditional_unet() -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = UNet2DConditionModel(**CONDITIONAL).eval()
    return model


def with_lora() -> nn.Module:
    model: Any = conditional_unet().requires_grad_(False)
    model.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q", "to_k", "to_v"], init_lora_weights=False))
    return model  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("build", "parameters"),
    [(tiny_dit, None), (tiny_unet, None), (conditional_unet, ["*attn2*"]), (with_lora, None)],
)
def test_checkpointing_of_diffusers_models_changes_no_sketch(build: Any, parameters: Any) -> None:
    steps, given = torch.tensor([3, 50, 7, 9]), {}
    if build in (conditional_unet, with_lora):
        given["encoder_hidden_states"] = torch.randn(4, 3, 8, generator=torch.Generator().manual_seed(0))
    elif build is tiny_dit:
        given["class_labels"] = steps % 10
    found = []
    for checkpointing in (False, True):
        model = build().train()
        if checkpointing:
            model.enable_gradient_checkpointing()
        with rs.GradientSketcher(model, rs.CountSketch(256), parameters=parameters) as sketcher:
            for _ in range(2):
                torch.manual_seed(0)
                sketch, _norm = sketcher(losses_of(model(random_images(4), steps, **given).sample))
        found.append(sketch)
    assert float(found[0].norm()) > 0
    close(*found)


class UsedAround(nn.Module):
    """Uses the weight of its layer without calling it: before its call, or after, but not at first."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.kind = KINDS[kind](), ""

    def forward(self, x: Tensor) -> Tensor:
        weight = getattr(self.layer, "weight", getattr(self.layer, "gain", None))
        before = x * weight.mean() if self.kind == "before" else x  # type: ignore[union-attr]
        after = self.layer(before)
        return after * weight.mean() if self.kind == "after" else after  # type: ignore[union-attr,no-any-return]


class Gain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(6))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gain


KINDS: dict[str, Any] = {
    "linear": lambda: nn.Linear(6, 6),
    "norm": lambda: nn.GroupNorm(2, 6),
    "no rule": Gain,
    "whole": lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(6, 6)).eval(),
}


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("check", [True, False])
def test_a_weight_used_around_its_layer_is_named_in_whatever_batch_it_is(kind: str, when: str, check: bool) -> None:
    model = UsedAround(kind)
    with rs.GradientSketcher(model, rs.CountSketch(16), check=check) as sketcher:
        for _ in range(2):
            sketcher(losses_of(model(rows())))
        model.kind = when
        with pytest.raises(rs.gradients.UncapturableError, match=r"'layer\..*' is used outside its own layer's"):
            sketcher(losses_of(model(rows())))
    assert all(one.grad is None and one.requires_grad for one in model.parameters())


def test_nothing_outside_the_model_gets_a_gradient() -> None:
    model, encoder = small(), nn.Linear(6, 6)
    expected = by_autograd(nn.Sequential(encoder, model), rows())[:, 42:]
    x, scale = rows().requires_grad_(), torch.ones(4, requires_grad=True)
    with rs.GradientSketcher(model, rs.Identity()) as sketcher:
        for _ in range(3):
            close(sketcher(scale * losses_of(model(encoder(x))))[0], expected)
    assert all(leaf.grad is None for leaf in (x, scale, *encoder.parameters()))


@pytest.mark.parametrize("check", [True, False])
def test_a_layer_whose_output_hides_its_tensors_is_refused_by_name(check: bool) -> None:
    class Output:
        def __init__(self, sample: Tensor) -> None:
            self.sample = sample

    class Hiding(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.gain = nn.Linear(6, 6), nn.Parameter(torch.ones(6))

        def forward(self, x: Tensor) -> Output:
            return Output(self.inner(x) * self.gain)

    model = Hiding()
    with rs.GradientSketcher(model, rs.Identity(), check=check) as sketcher:
        with pytest.raises(
            rs.gradients.UncapturableError, match=r"layer '' \(Hiding\) returns an object of type Output, in"
        ):
            model(rows())
        assert sketcher.shapes
    with rs.GradientSketcher(model, rs.Identity(), parameters=["inner.*"], check=check) as sketcher:
        assert float(sketcher(losses_of(model(rows()).sample))[1].min()) > 0


def test_a_model_within_a_sketchers_context_is_refused_to_others_which_come_after_it() -> None:
    model = small()
    one, other = (rs.GradientSketcher(model, rs.Identity()) for _ in range(2))
    for again in (one, other, rs.GradientSketcher(model[0], rs.Identity())):
        with one:
            with pytest.raises(RuntimeError, match="within another GradientSketcher's context"):
                again.__enter__()
            with pytest.raises(RuntimeError, match="has to be left first"):
                LiveSketcher(model, rs.Identity())
            close(one(losses_of(model(rows())))[0], by_autograd(model, rows()))
    with other:
        close(other(losses_of(model(rows())))[0], by_autograd(model, rows()))
    assert not any(layer._forward_hooks or layer._forward_pre_hooks for layer in model.modules())
    assert all(not one._backward_hooks for one in model.parameters())
