"""Every denoiser class of diffusers against autograd, one sample at a time."""

from __future__ import annotations

from typing import Any

import pytest
from peft import LoraConfig

import retrac_scale as rs
from tests.architectures import ARCHITECTURES, build, largest_error

FIT = [name for name, architecture in ARCHITECTURES.items() if not architecture.unfit]


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
