"""What models of `benchmarks.paper` have besides those of `evaluate.settings`: adapters, and a loss of their own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from peft import LoraConfig
from torch import Tensor

import retrac_scale as rs
from retrac_scale.evaluate.settings.images import Images
from retrac_scale.evaluate.settings.training import DEVICE, Training


@dataclass(frozen=True)
class LoRATraining(Training):
    """Of LoRA adapters alone, in the attention layers of a Stable Diffusion's U-Net, as diffusers' example has them."""

    batch: int = 16
    learning_rate: float = 1e-4
    channels: tuple[int, ...] = ()
    base: str = ""  # a folder in diffusers' layout
    rank: int = 4

    def scheduler(self) -> Any:
        """That of the base, for training."""
        return DDPMScheduler.from_pretrained(self.base, subfolder="scheduler")

    def build(self, shape: Sequence[int], seed: int = 0) -> Any:
        """The base's U-Net with new adapters, its only trainable parameters."""
        torch.manual_seed(seed)
        model = UNet2DConditionModel.from_pretrained(self.base, subfolder="unet", torch_dtype=torch.float32)
        model.requires_grad_(False)
        layers = ["to_k", "to_q", "to_v", "to_out.0"]
        adapters = LoraConfig(r=self.rank, lora_alpha=self.rank, target_modules=layers, init_lora_weights="gaussian")
        model.add_adapter(adapters)
        return model.to(DEVICE)

    def bounded(self, images: Tensor) -> Tensor:
        """Latents, which have no range."""
        return images


@dataclass(frozen=True, eq=False)
class Losses:
    """`losses(weights)`: the loss of each query, `[q]`, averaged over the same timesteps and noises for every model."""

    images: Images
    training: Training
    timesteps: int = 50
    draws: int = 2

    @property
    def key(self) -> str:
        """A digest of the queries."""
        return self.images.digest

    def __call__(self, weights: dict[str, Tensor]) -> Any:
        """Means over `timesteps * draws` pairs."""
        shape, ids = self.images.images.shape[1:], np.arange(len(self.images))
        task = rs.DiffusionTask(self.training.build(shape), self.training.scheduler(), device=DEVICE)
        task.load("measured", weights)
        plan = rs.EvenlySpaced(self.timesteps, self.draws).pairs("", ids, task.num_train_timesteps)
        total = torch.zeros(len(ids), dtype=torch.float64)
        with torch.no_grad():
            for steps, seeds in zip(plan.timesteps.T, plan.seeds.T, strict=True):
                for draw in range(self.draws):
                    noise = rs.draw_noise(shape, ids, steps, seeds, draw=draw)
                    times, given = torch.from_numpy(steps), self.images.given
                    total += task.losses(self.images.images, times, noise, given).cpu()
        return (total / (self.timesteps * self.draws)).numpy()
