"""Tiny real models, schedulers and image sets."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, DiTTransformer2DModel, UNet2DModel
from hypothesis import settings
from torch import Tensor, nn

settings.register_profile("tests", deadline=None, max_examples=25, derandomize=True)
settings.load_profile("tests")
torch.set_num_threads(1)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--plain", action="store_true", help="run references in place of compiled passes")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("plain"):
        from tests.native import references  # which loads every compiled module

        references.put_in_place()


@pytest.fixture
def small_layers_mixed(monkeypatch: pytest.MonkeyPatch) -> None:
    """`LowRank` mixes the layers of tiny models too, where that saves no time."""
    monkeypatch.setattr("retrac_scale.projections.lowrank._worth_mixing", lambda shape, rank: rank <= shape[0])


def tiny_unet(seed: int = 0) -> nn.Module:
    """Convolutions, group norms, attention, time embedding, down- and upsampling; 8 x 8 images of one channel."""
    torch.manual_seed(seed)
    model: nn.Module = UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
        attention_head_dim=8,
    )
    return model.eval()


def tiny_resampling_unet(seed: int = 0) -> nn.Module:
    """The same with learned resnet down- and upsampling and no attention."""
    torch.manual_seed(seed)
    model: nn.Module = UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(8, 8),
        layers_per_block=1,
        down_block_types=("ResnetDownsampleBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "ResnetUpsampleBlock2D"),
        norm_num_groups=4,
    )
    return model.eval()


def tiny_dit(seed: int = 0) -> nn.Module:
    """Linear layers, adaptive norms and class embeddings."""
    torch.manual_seed(seed)
    model: nn.Module = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=4,
        in_channels=1,
        out_channels=1,
        num_layers=2,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=10,
        norm_num_groups=4,
    )
    return model.eval()


CONDITIONAL: dict[str, Any] = {
    "sample_size": 8,
    "in_channels": 1,
    "out_channels": 1,
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "norm_num_groups": 4,
    "cross_attention_dim": 8,
    "attention_head_dim": 2,
}
"""Of a U-Net that takes embeddings."""

MODELS: dict[str, Callable[[int], nn.Module]] = {
    "unet": tiny_unet,
    "resampling unet": tiny_resampling_unet,
    "dit": tiny_dit,
}


@pytest.fixture(scope="session")
def scheduler() -> Any:
    return DDPMScheduler(num_train_timesteps=100, beta_schedule="squaredcos_cap_v2")


def random_images(n: int, seed: int = 0) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal((n, 1, 8, 8), dtype=np.float32))


class Labelled:
    """Images with class labels, and optionally ids of one's own."""

    def __init__(self, images: Tensor, ids: Any = None) -> None:
        self.images = images
        if ids is not None:
            self.ids = ids

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, row: int) -> tuple[Tensor, int]:
        return self.images[row], row % 10
