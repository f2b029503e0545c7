"""Diffusion models trained on 8 x 8 digits, quickly."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DDIMScheduler, DDPMScheduler, UNet2DModel
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

import retrac_scale as rs

SAMPLING_STEPS = 50


@dataclass(frozen=True)
class Training:
    """How a model is trained; two trainings with the same parameters, ids and seed end with the same weights."""

    epochs: int = 100
    kept: tuple[int, ...] = (25, 50, 75, 100)
    batch: int = 32
    learning_rate: float = 2e-3
    warmup_steps: int = 100
    channels: tuple[int, ...] = (16, 32)


def digits(seed: int = 0) -> Tensor:
    """scikit-learn's 1,797 digits at their native 8 x 8, shuffled, in -1 .. 1, `[n, 1, 8, 8]`."""
    images = torch.from_numpy(load_digits().images).float().unsqueeze(1) / 8 - 1
    return images[torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))]


def scheduler() -> Any:
    """The paper's cosine schedule."""
    return DDPMScheduler(num_train_timesteps=1000, beta_schedule="squaredcos_cap_v2")


def build(training: Training, seed: int = 0) -> UNet2DModel:
    """A U-Net of 0.18 M parameters (with the default channels) for 8 x 8 grey images."""
    torch.manual_seed(seed)
    return UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=training.channels,
        layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=8,
        attention_head_dim=16,
    )


@dataclass(frozen=True, eq=False)
class Trainer:
    """`trainer(ids, seed)`: the weights of a model trained on some of the images; what was trained once is kept.

    Order, timesteps and noise of a sample in an epoch depend on the seed, the epoch and the sample, not on what else is
    in the training set: models of the same seed differ by the samples that they saw.
    """

    images: Tensor
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
        how, noising = self.training, scheduler()
        model = build(how, seed).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=how.learning_rate, weight_decay=0, fused=True)
        recorder = None if record is None else rs.TrainingRecorder(record, len(self.images), noising)
        batches = -(-len(ids) // how.batch)
        kept: dict[str, dict[str, Tensor]] = {}
        for epoch in range(1, how.epochs + 1):
            rng = np.random.default_rng([seed, epoch])
            order = rng.permutation(len(self.images))
            steps_of = rng.integers(0, noising.config.num_train_timesteps, len(self.images))
            for number, batch in enumerate(np.array_split(order[np.isin(order, ids)], batches)):
                step = (epoch - 1) * batches + number
                rate = how.learning_rate * min(1, (step + 1) / how.warmup_steps) * (1 - step / (how.epochs * batches))
                for group in optimizer.param_groups:
                    group["lr"] = rate
                timesteps, noise_seed = torch.from_numpy(steps_of[batch]), seed * how.epochs + epoch
                noise = rs.draw_noise(self.images.shape[1:], batch, timesteps, noise_seed)
                noisy = noising.add_noise(self.images[batch], noise, timesteps)
                loss = F.mse_loss(model(noisy, timesteps).sample, noise)
                optimizer.zero_grad()
                torch.autograd.backward(loss)
                optimizer.step()
                if recorder is not None:
                    recorder.step(batch, timesteps, noise_seed, rate)
            if epoch in how.kept:
                name = f"epoch-{epoch:03d}"
                kept[name] = {key: value.detach().clone() for key, value in model.state_dict().items()}
                if recorder is not None:
                    recorder.checkpoint(name)
        return kept


@dataclass(frozen=True, eq=False)
class Losses:
    """`losses(weights)`: the loss of each query, `[q]`, averaged over the same timesteps and noises for every model."""

    images: Tensor
    training: Training
    timesteps: int = 50
    draws: int = 2

    def __call__(self, weights: dict[str, Tensor]) -> Any:
        """Means over `timesteps * draws` pairs."""
        model = build(self.training)
        model.load_state_dict(weights)
        task, ids = rs.DiffusionTask(model, scheduler()), np.arange(len(self.images))
        plan = rs.EvenlySpaced(self.timesteps, self.draws).pairs("", ids, task.num_train_timesteps)
        total = torch.zeros(len(ids), dtype=torch.float64)
        with torch.no_grad():
            for steps, seeds in zip(plan.timesteps.T, plan.seeds.T, strict=True):
                for draw in range(self.draws):
                    noise = rs.draw_noise(self.images.shape[1:], ids, steps, seeds, draw=draw)
                    total += task.losses(self.images, torch.from_numpy(steps), noise, {})
        return (total / (self.timesteps * self.draws)).numpy()


def sampler() -> Any:
    """DDIM."""
    return DDIMScheduler.from_config(scheduler().config)


def start(count: int, size: int) -> Tensor:
    """The noise that generated images begin with, `[count, 1, size, size]`."""
    return torch.randn(count, 1, size, size, generator=torch.Generator().manual_seed(1))


def generate(model: nn.Module, weights: Any, count: int, file: Path) -> Tensor:
    """`count` images, `[count, 1, size, size]`, that are kept in `file`."""
    if not file.exists():
        model.load_state_dict(weights)
        steps, images = sampler(), start(count, model.config.sample_size)
        steps.set_timesteps(SAMPLING_STEPS)
        with torch.no_grad():
            for step in steps.timesteps:
                images = steps.step(model.eval()(images, step).sample, step, images).prev_sample
        save(images.clamp(-1, 1), file)
    loaded: Tensor = torch.load(file, weights_only=True)
    return loaded


def save(value: Any, file: Path) -> None:
    """Write a file that is there whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(f".{os.getpid()}.partial")
    torch.save(value, partial)
    os.replace(partial, file)
