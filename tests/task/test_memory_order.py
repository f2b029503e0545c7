"""A task leaves the caller's model as it was, and computes its convolutions channels last all the same."""

from __future__ import annotations

import sys
from pathlib import Path
from subprocess import run
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import retrac_scale as rs
from retrac_scale.task.memory_order import channels_last, takes_any_order
from tests.conftest import random_images, tiny_unet
from tests.small_denoiser import SmallDenoiser


def test_weights_keep_their_memory_order_and_can_be_saved(scheduler: Any, tmp_path: Path) -> None:
    model = tiny_unet()
    before = {name: (value.data_ptr(), value.stride()) for name, value in model.state_dict().items()}
    task = rs.DiffusionTask(model, scheduler)
    rs.sketch(
        task,
        random_images(3),
        None,
        checkpoints={"a": {name: value.clone() for name, value in model.state_dict().items()}},
        timesteps=rs.Explicit([3]),
        projection=rs.CountSketch(16),
        progress=False,
    )
    assert {name: (value.data_ptr(), value.stride()) for name, value in model.state_dict().items()} == before
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
    save_file(model.state_dict(), tmp_path / "weights.safetensors")


def test_activations_of_known_layers_lie_channels_last_and_are_the_same() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), nn.Conv2d(8, 4, 3))
    x = torch.randn(2, 3, 8, 8)
    with channels_last(model):
        found = model(x)
    assert found.is_contiguous(memory_format=torch.channels_last)
    assert model(x).is_contiguous()
    torch.testing.assert_close(found, model(x))


def test_a_model_with_code_of_its_own_gets_the_memory_order_it_was_written_for(scheduler: Any) -> None:
    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.out = nn.Conv2d(1, 4, 3, padding=1), nn.Linear(64, 16)

        def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
            return self.out(self.conv(x).view(len(x), -1)).view_as(x)  # type: ignore[no-any-return]

    model = Flat()
    assert not takes_any_order(model)
    assert not takes_any_order(SmallDenoiser())
    assert takes_any_order(tiny_unet())
    store = rs.sketch(
        rs.DiffusionTask(model, scheduler),
        torch.randn(3, 1, 4, 4),
        None,
        checkpoints={"a": {name: value.clone() for name, value in model.state_dict().items()}},
        timesteps=rs.Explicit([3]),
        projection=rs.CountSketch(16),
        progress=False,
    )
    assert store.is_complete


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's malloc")
def test_a_sketcher_leaves_the_processs_memory_allocator_alone() -> None:
    code = (
        "import torch, retrac_scale as rs, retrac_scale.native.memory as memory\n"
        "model = torch.nn.Linear(3, 2)\n"
        "with rs.GradientSketcher(model, rs.Identity()) as sketcher: sketcher(model(torch.randn(2, 3)).sum(1))\n"
        "assert memory.keep_freed_pages.cache_info().misses == 0"
    )
    run([sys.executable, "-c", code], check=True)
