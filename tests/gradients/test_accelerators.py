"""What can be known of an accelerator without one: on tensors that hold no data, a copy to the host is an error."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import retrac_scale as rs
from retrac_scale.gradients import registry
from tests.architectures import ARCHITECTURES, batch, build, losses

PROJECTIONS = [rs.CountSketch(64), rs.LowRank(4, 64), rs.LowRank(None, 64), rs.Identity()]
NAMES = ["UNet2DModel", "UNet2DConditionModel", "DiTTransformer2DModel", "SD3Transformer2DModel", "AutoencoderKL"]


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """A device that is not the CPU; torch knows no autocast for it."""
    monkeypatch.setattr(torch, "get_autocast_dtype", lambda kind: torch.bfloat16)
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda kind="": False)
    return torch.device("meta")


def moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {key: moved(one, device) for key, one in value.items()}
    return [moved(one, device) for one in value] if isinstance(value, list) else value


class Layers(nn.Module):
    """One layer of each kind that has a rule of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(5, 16)
        self.linear = nn.Linear(16, 16)
        self.norm = nn.LayerNorm(16)
        self.root = nn.RMSNorm(16)
        self.line = nn.Conv1d(16, 16, 3, padding=1)
        self.longer = nn.ConvTranspose1d(16, 16, 1)
        self.groups = nn.GroupNorm(4, 16)
        self.plane = nn.Conv2d(16, 16, 3, padding=1, groups=2)
        self.space = nn.Conv3d(16, 16, 1)
        self.deeper = nn.ConvTranspose3d(16, 16, 1)
        self.up = nn.ConvTranspose2d(16, 16, 2, stride=2)

    def forward(self, words: torch.Tensor) -> torch.Tensor:
        x = self.root(self.norm(self.linear(self.table(words)))).mT
        x = self.groups(self.longer(self.line(x))).unflatten(2, (4, 4))
        x = self.deeper(self.space(self.plane(x)[:, :, None]))[:, :, 0]
        value: torch.Tensor = self.up(x).flatten(1).square().sum(1)
        return value


@pytest.mark.parametrize("projection", PROJECTIONS, ids=str)
def test_every_rule_stays_on_the_device(projection: Any, elsewhere: torch.device) -> None:
    model = Layers()
    expected = rs.GradientSketcher(model, projection, check=False)
    words = torch.arange(48).reshape(3, 16) % 5
    with expected:
        here = expected(model(words))
    model = model.to(elsewhere)
    sketcher = rs.GradientSketcher(model, projection, check=False)
    with sketcher:
        there = sketcher(model(words.to(elsewhere)))
    assert [one.device.type for one in there] == ["meta", "meta"]
    assert [(one.shape, one.dtype) for one in there] == [(one.shape, one.dtype) for one in here]


def test_the_layers_above_are_all_that_rules_are_for() -> None:
    here = {f"{type(layer).__module__}.{type(layer).__qualname__}" for layer in Layers().modules()}
    assert {kind for kind in registry._rules if kind.startswith("torch.nn.")} <= here


@pytest.mark.parametrize("name", [name for name in NAMES if name in ARCHITECTURES])
def test_a_denoiser_is_sketched_without_a_copy_to_the_host(name: str, elsewhere: torch.device) -> None:
    architecture = ARCHITECTURES[name]
    model = build(name, architecture).to(elsewhere)
    arguments = moved(batch(architecture) | architecture.shared, elsewhere)
    sketcher = rs.GradientSketcher(model, rs.LowRank(4, 64), check=False)
    with sketcher:
        sketches, norms = sketcher(losses(model, arguments, architecture.samples))
    assert sketches.device.type == norms.device.type == "meta"
