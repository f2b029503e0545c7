"""Every denoiser class of diffusers against autograd, one sample at a time."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig

import retrac_scale as rs
from retrac_scale.gradients import UncapturableError
from tests.architectures import ARCHITECTURES, batch, build, largest_error

LARGE = ("WanAnimate2Transformer3DModel", "AnyFlowFARTransformer3DModel")
"""Of those that are refused, the ones whose forward pass takes seconds."""
FIT = [name for name, architecture in ARCHITECTURES.items() if not architecture.refused]


@pytest.mark.filterwarnings(
    "ignore::FutureWarning", "ignore:In CPU autocast:UserWarning", "ignore:Mismatch dtype between input and weight"
)
@pytest.mark.parametrize("name", FIT)
def test_sketches_of_a_denoiser_equal_autograd(name: str) -> None:
    assert largest_error(build(name, ARCHITECTURES[name]), ARCHITECTURES[name]) < 1e-4


@pytest.mark.parametrize("name", ["UNet2DConditionModel", "FluxTransformer2DModel"])
def test_sketches_of_lora_adapters_equal_autograd(name: str) -> None:
    architecture = ARCHITECTURES[name]
    model: Any = build(name, architecture)
    model.requires_grad_(False)
    model.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_k", "to_v", "to_out.0"], init_lora_weights=False))
    assert all("lora_" in parameter for parameter in rs.GradientSketcher(model, rs.Identity()).shapes)
    assert largest_error(model, architecture) < 1e-4


def test_sketches_under_gradient_checkpointing_equal_autograd() -> None:
    architecture = ARCHITECTURES["PixArtTransformer2DModel"]
    model: Any = build("PixArtTransformer2DModel", architecture)
    model.enable_gradient_checkpointing()
    assert largest_error(model, architecture) < 1e-4


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow) if name in LARGE else name
        for name in ARCHITECTURES
        if name not in FIT
    ],
)
def test_what_cannot_be_sketched_is_refused_with_its_reason(name: str) -> None:
    architecture = ARCHITECTURES[name]
    example = batch(architecture) | architecture.shared
    with pytest.raises(UncapturableError, match=architecture.refused) as refusal:
        rs.check_model(build(name, architecture), example, samples=architecture.samples)
    assert name in str(refusal.value)
    assert any(repr(parameter) in str(refusal.value) for parameter in refusal.value.parameters)


def test_several_samples_in_one_sequence_are_refused() -> None:
    architecture = ARCHITECTURES["ZImageTransformer2DModel"]
    model = build("ZImageTransformer2DModel", architecture)
    two = {key: torch.cat([value] * 2) if key == "t" else value * 2 for key, value in architecture.shared.items()}
    with pytest.raises(UncapturableError, match=r"ZImageTransformer2DModel joins the tokens .* of 2 samples"):
        rs.check_model(model, two, samples=2)
    with rs.GradientSketcher(model, rs.LowRank(4, 64)) as sketcher:
        losses = torch.stack([output.square().mean() for output in model(**two).sample])
        with pytest.raises(UncapturableError, match="one sample in each forward pass"):
            sketcher(losses)
    assert rs.check_model(model, architecture.shared, samples=1).exact
