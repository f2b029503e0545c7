"""How the models of the settings are trained: small U-Nets with a cosine schedule, and what differs from them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DDPMScheduler, DiTTransformer2DModel, FlowMatchEulerDiscreteScheduler, UNet2DModel
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Random numbers of a seed, and afterwards the caller's own again."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


@dataclass(frozen=True)
class Training:
    """How a model is trained; two trainings with the same parameters, ids and seed end with the same weights."""

    epochs: int = 100
    kept: tuple[int, ...] = (25, 50, 75, 100)
    batch: int = 32
    learning_rate: float = 2e-3
    warmup_steps: int = 100
    channels: tuple[int, ...] = (16, 32)

    def scheduler(self) -> Any:
        """The paper's cosine schedule."""
        return DDPMScheduler(num_train_timesteps=1000, beta_schedule="squaredcos_cap_v2")

    def build(self, shape: Sequence[int], seed: int = 0) -> Any:
        """A U-Net for images of one shape (c, size, size) with attention at its lowest resolution."""
        return self._unet(shape, seed)

    def adapted(self, model: Any, seed: int = 0) -> Any:
        """The model with what alone is trained of it: all, unless adapters are."""
        return model

    def bounded(self, images: Tensor) -> Tensor:
        """Pixels within their range."""
        return images.clamp(-1, 1)

    def _unet(self, shape: Sequence[int], seed: int, **more: Any) -> Any:
        plain = len(self.channels) - 1
        with seeded(seed):
            return UNet2DModel(
                sample_size=shape[-1],
                in_channels=shape[0],
                out_channels=shape[0],
                block_out_channels=self.channels,
                layers_per_block=1,
                down_block_types=("DownBlock2D",) * plain + ("AttnDownBlock2D",),
                up_block_types=("AttnUpBlock2D",) + ("UpBlock2D",) * plain,
                norm_num_groups=8,
                attention_head_dim=16,
                **more,
            ).to(DEVICE)


@dataclass(frozen=True)
class ClassTraining(Training):
    """Of a U-Net that is told the class of an image, as `class_labels`."""

    classes: int = 8

    def build(self, shape: Sequence[int], seed: int = 0) -> Any:
        """The same U-Net with an embedding of classes."""
        return self._unet(shape, seed, num_class_embeds=self.classes)


@dataclass(frozen=True)
class DiTTraining(Training):
    """Of a transformer on patches, told the class, by flow matching (Peebles and Xie 2023; Lipman et al. 2023)."""

    classes: int = 8
    width: int = 96
    heads: int = 4
    layers: int = 4

    def scheduler(self) -> Any:
        """Straight paths from noise to images, unshifted."""
        return FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000)

    def build(self, shape: Sequence[int], seed: int = 0) -> Any:
        """A DiT on patches of 2 x 2."""
        with seeded(seed):
            return DiTTransformer2DModel(
                num_attention_heads=self.heads,
                attention_head_dim=self.width // self.heads,
                in_channels=shape[0],
                out_channels=shape[0],
                num_layers=self.layers,
                sample_size=shape[-1],
                patch_size=2,
                num_embeds_ada_norm=self.classes,
                norm_num_groups=4,
            ).to(DEVICE)


@dataclass(frozen=True)
class AdapterTraining(Training):
    """Of low-rank adapters (Hu et al. 2021) in attention and convolutions alone; needs PEFT."""

    rank: int = 8
    layers: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0", "conv1", "conv2")

    def adapted(self, model: Any, seed: int = 0) -> Any:
        """The model with new adapters, its only trainable parameters."""
        from peft import LoraConfig, inject_adapter_in_model

        adapters = LoraConfig(r=self.rank, lora_alpha=self.rank, target_modules=list(self.layers))
        with seeded(seed):
            return inject_adapter_in_model(adapters, model).to(DEVICE)
