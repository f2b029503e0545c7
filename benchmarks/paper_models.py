"""The models of `benchmarks.paper`: trained on any of their images, sampled, measured."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DDPMScheduler, UNet2DModel
from torch import Tensor
from torch.nn import functional as F

import retrac_scale as rs

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


def scheduler() -> Any:
    """The paper's cosine schedule."""
    return DDPMScheduler(num_train_timesteps=1000, beta_schedule="squaredcos_cap_v2")


def build(training: Training, shape: Sequence[int], seed: int = 0) -> UNet2DModel:
    """A U-Net for images of one shape (c, size, size) with attention at its lowest resolution."""
    torch.manual_seed(seed)
    plain = len(training.channels) - 1
    return UNet2DModel(
        sample_size=shape[-1],
        in_channels=shape[0],
        out_channels=shape[0],
        block_out_channels=training.channels,
        layers_per_block=1,
        down_block_types=("DownBlock2D",) * plain + ("AttnDownBlock2D",),
        up_block_types=("AttnUpBlock2D",) + ("UpBlock2D",) * plain,
        norm_num_groups=8,
        attention_head_dim=16,
    ).to(DEVICE)


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
        model = build(how, self.images.shape[1:], seed).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=how.learning_rate, weight_decay=0, fused=True)
        if record is not None:  # of a training that was interrupted
            shutil.rmtree(record, ignore_errors=True)
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
                loss = F.mse_loss(model(noisy.to(DEVICE), timesteps.to(DEVICE)).sample, noise.to(DEVICE))
                optimizer.zero_grad()
                torch.autograd.backward(loss)
                optimizer.step()
                if recorder is not None:
                    recorder.step(batch, timesteps, noise_seed, rate)
            if epoch in how.kept:
                name = f"epoch-{epoch:03d}"
                kept[name] = {key: value.detach().cpu().clone() for key, value in model.state_dict().items()}
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

    @property
    def key(self) -> str:
        """A digest of the queries."""
        return hashlib.blake2b(self.images.numpy().tobytes(), digest_size=12).hexdigest()

    def __call__(self, weights: dict[str, Tensor]) -> Any:
        """Means over `timesteps * draws` pairs."""
        model = build(self.training, self.images.shape[1:])
        model.load_state_dict(weights)
        task, ids = rs.DiffusionTask(model, scheduler(), device=DEVICE), np.arange(len(self.images))
        plan = rs.EvenlySpaced(self.timesteps, self.draws).pairs("", ids, task.num_train_timesteps)
        total = torch.zeros(len(ids), dtype=torch.float64)
        with torch.no_grad():
            for steps, seeds in zip(plan.timesteps.T, plan.seeds.T, strict=True):
                for draw in range(self.draws):
                    noise = rs.draw_noise(self.images.shape[1:], ids, steps, seeds, draw=draw)
                    total += task.losses(self.images, torch.from_numpy(steps), noise, {}).cpu()
        return (total / (self.timesteps * self.draws)).numpy()


def beginning(count: int, model: UNet2DModel) -> tuple[Tensor, torch.Generator]:
    """The noise that a model's generated images begin with, `[count, c, size, size]`, and what draws the rest."""
    random, size = torch.Generator().manual_seed(1), model.config.sample_size
    return torch.randn(count, model.config.in_channels, size, size, generator=random), random


def generate(model: UNet2DModel, weights: Any, count: int, file: Path) -> Tensor:
    """`count` images by ancestral sampling, `[count, c, size, size]`, that are kept in `file`.

    DDIM would leave a common blemish on all images, and queries that share it share proponents.
    """
    if not file.exists():
        model.load_state_dict(weights)
        model.to(DEVICE).eval()
        sampler, (images, random) = scheduler(), beginning(count, model)
        sampler.set_timesteps(SAMPLING_STEPS)
        with torch.no_grad():
            for step in sampler.timesteps:
                output = model(images.to(DEVICE), step.to(DEVICE)).sample.cpu()
                images = sampler.step(output, step, images, generator=random).prev_sample
        save(images.clamp(-1, 1), file)
    loaded: Tensor = torch.load(file, weights_only=True)
    return loaded


def save(value: Any, file: Path) -> None:
    """Write a file that is there whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(f".{os.getpid()}.partial")
    torch.save(value, partial)
    os.replace(partial, file)
