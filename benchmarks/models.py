"""The models that the benchmarks run on, and a batch for each."""

from __future__ import annotations

import torch
from diffusers import DDPMScheduler, UNet2DModel
from torch import Tensor

CONFIGS = {
    "u-small": {
        "sample_size": 16,
        "in_channels": 1,
        "out_channels": 1,
        "block_out_channels": (32, 64),
        "layers_per_block": 1,
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
        "norm_num_groups": 8,
        "attention_head_dim": 16,
    },
    # the published configuration of google/ddpm-cifar10-32 (Ho, Jain, Abbeel 2020)
    "u-cifar": {
        "sample_size": 32,
        "in_channels": 3,
        "out_channels": 3,
        "block_out_channels": (128, 256, 256, 256),
        "layers_per_block": 2,
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        "downsample_padding": 0,
        "flip_sin_to_cos": False,
        "freq_shift": 1,
        "norm_eps": 1e-6,
        "attention_head_dim": None,
    },
}


def build(name: str, device: str = "cpu") -> UNet2DModel:
    """The model with random weights, in eval mode."""
    torch.manual_seed(0)
    return UNet2DModel(**CONFIGS[name]).to(device).eval()


def noisy_batch(model: UNet2DModel, n: int, device: str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
    """Noisy images, timesteps and noise for n pairs."""
    generator = torch.Generator().manual_seed(1)
    shape = (n, model.config.in_channels, model.config.sample_size, model.config.sample_size)
    images, noise = torch.rand(shape, generator=generator) * 2 - 1, torch.randn(shape, generator=generator)
    timesteps = torch.randint(0, 1000, (n,), generator=generator)
    noisy = DDPMScheduler().add_noise(images, noise, timesteps)
    return noisy.to(device), timesteps.to(device), noise.to(device)
