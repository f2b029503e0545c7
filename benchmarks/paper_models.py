"""The models of `benchmarks.paper`: trained on any of their images, sampled, measured."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DDPMScheduler, UNet2DConditionModel, UNet2DModel
from peft import LoraConfig
from torch import Tensor
from torch.nn import functional as F

import retrac_scale as rs
from benchmarks.paper_data import Images
from retrac_scale.task.checkpoints import load_checkpoint
from retrac_scale.task.noising import noising_of

SAMPLING_STEPS = 100
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


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
        torch.manual_seed(seed)
        plain = len(self.channels) - 1
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
        ).to(DEVICE)

    def bounded(self, images: Tensor) -> Tensor:
        """Pixels within their range."""
        return images.clamp(-1, 1)


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
class Trainer:
    """`trainer(ids, seed)`: the weights of a model trained on some of the images; what was trained once is kept.

    Order, timesteps and noise of a sample in an epoch depend on the seed, the epoch and the sample, not on what else is
    in the training set: models of the same seed differ by the samples that they saw.
    """

    images: Images
    training: Training
    folder: Path

    def __call__(self, ids: Any, seed: int) -> dict[str, Tensor]:
        """The last weights."""
        return self.checkpoints(ids, seed)[f"epoch-{self.training.kept[-1]:03d}"]

    def checkpoints(self, ids: Any, seed: int, record: Path | None = None) -> dict[str, dict[str, Tensor]]:
        """Weights at the kept epochs, and the training record in a folder; without one, the last weights alone."""
        file = self._file(ids, seed, record is not None)
        if not file.exists():
            kept = self._train(np.sort(np.asarray(ids)), seed, record)
            save(dict([list(kept.items())[-1]]), self._file(ids, seed, False))
            if record is not None:
                save(kept, file)
        loaded: dict[str, dict[str, Tensor]] = torch.load(file, weights_only=True)
        return loaded

    def _file(self, ids: Any, seed: int, recorded: bool) -> Path:
        listed = repr((self.training, seed, np.asarray(ids).tolist(), recorded)).encode()
        return self.folder / f"{hashlib.blake2b(listed, digest_size=12).hexdigest()}.pt"

    def _train(self, ids: Any, seed: int, record: Path | None) -> dict[str, dict[str, Tensor]]:
        how, noising, images = self.training, self.training.scheduler(), self.images.images
        model = how.build(images.shape[1:], seed).train()
        trained = {name: value for name, value in model.named_parameters() if value.requires_grad}
        optimizer = torch.optim.AdamW(trained.values(), lr=how.learning_rate, weight_decay=0, fused=True)
        target = noising_of(noising, model).target
        if record is not None:  # of a training that was interrupted
            shutil.rmtree(record, ignore_errors=True)
        recorder = None if record is None else rs.TrainingRecorder(record, len(images), noising)
        batches = -(-len(ids) // how.batch)
        kept: dict[str, dict[str, Tensor]] = {}
        for epoch in range(1, how.epochs + 1):
            rng = np.random.default_rng([seed, epoch])
            order = rng.permutation(len(images))
            steps_of = rng.integers(0, noising.config.num_train_timesteps, len(images))
            for number, batch in enumerate(np.array_split(order[np.isin(order, ids)], batches)):
                step = (epoch - 1) * batches + number
                rate = how.learning_rate * min(1, (step + 1) / how.warmup_steps) * (1 - step / (how.epochs * batches))
                for group in optimizer.param_groups:
                    group["lr"] = rate
                timesteps, noise_seed = torch.from_numpy(steps_of[batch]), seed * how.epochs + epoch
                noise = rs.draw_noise(images.shape[1:], batch, timesteps, noise_seed)
                noisy = noising.add_noise(images[batch], noise, timesteps)
                told = {name: values[batch].to(DEVICE) for name, values in self.images.given.items()}
                predicted = model(noisy.to(DEVICE), timesteps.to(DEVICE), **told).sample
                loss = F.mse_loss(predicted, target(images[batch], noise, timesteps).to(DEVICE))
                optimizer.zero_grad()
                torch.autograd.backward(loss)
                optimizer.step()
                if recorder is not None:
                    recorder.step(batch, timesteps, noise_seed, rate)
            if epoch in how.kept:
                name = f"epoch-{epoch:03d}"
                kept[name] = {key: value.detach().cpu().clone() for key, value in trained.items()}
                if recorder is not None:
                    recorder.checkpoint(name)
        return kept


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
        digest = hashlib.blake2b(digest_size=12)
        for values in (self.images.images, *self.images.given.values()):
            digest.update(values.numpy().tobytes())
        return digest.hexdigest()

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


def beginning(count: int, model: Any) -> tuple[Tensor, torch.Generator]:
    """The noise that a model's generated images begin with, `[count, c, size, size]`, and what draws the rest."""
    random, size = torch.Generator().manual_seed(1), model.config.sample_size
    return torch.randn(count, model.config.in_channels, size, size, generator=random), random


def generate(training: Training, model: Any, weights: Any, asked: Images, file: Path) -> Images:
    """As many images as are asked for, told the same, by ancestral sampling; they are kept in `file`.

    DDIM would leave a common blemish on all images, and queries that share it share proponents.
    """
    if not file.exists():
        load_checkpoint(model, "sampled", weights)
        model.to(DEVICE).eval()
        sampler, (images, random) = training.scheduler(), beginning(len(asked), model)
        told = {name: values.to(DEVICE) for name, values in asked.given.items()}
        sampler.set_timesteps(SAMPLING_STEPS)
        with torch.no_grad():
            for step in sampler.timesteps:
                output = model(images.to(DEVICE), step.to(DEVICE), **told).sample.cpu()
                images = sampler.step(output, step, images, generator=random).prev_sample
        save(training.bounded(images), file)
    return replace(asked, images=torch.load(file, weights_only=True), word="generated")


def save(value: Any, file: Path) -> None:
    """Write a file that is there whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(f".{os.getpid()}.partial")
    torch.save(value, partial)
    os.replace(partial, file)
