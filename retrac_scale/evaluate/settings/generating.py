"""Images that a model of a setting makes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from retrac_scale.evaluate.settings.images import Images
from retrac_scale.evaluate.settings.trainer import save
from retrac_scale.evaluate.settings.training import DEVICE, Training
from retrac_scale.task.checkpoints import load_checkpoint

SAMPLING_STEPS = 100


def beginning(count: int, model: Any) -> tuple[Tensor, torch.Generator]:
    """The noise that a model's generated images begin with, `[count, c, size, size]`, and what draws the rest."""
    random, size = torch.Generator().manual_seed(1), model.config.sample_size
    return torch.randn(count, model.config.in_channels, size, size, generator=random), random


def generate(training: Training, model: Any, weights: Any, asked: Images, file: Path) -> Images:
    """As many images as are asked for, told the same; they are kept in `file`."""
    if not file.exists():
        save(generate_anew(training, model, weights, asked), file)
    return replace(asked, images=torch.load(file, weights_only=True), word="generated")


def generate_anew(training: Training, model: Any, weights: Any, asked: Images) -> Tensor:
    """As many images as are asked for, told the same, by ancestral sampling (or Euler's steps of a flow).

    DDIM would leave a common blemish on all images, and queries that share it share proponents.
    """
    load_checkpoint(model, "sampled", weights)
    model.to(DEVICE).eval()
    sampler, (images, random) = training.scheduler(), beginning(len(asked), model)
    told = {name: values.to(DEVICE) for name, values in asked.given.items()}
    sampler.set_timesteps(SAMPLING_STEPS)
    with torch.no_grad():
        for step in sampler.timesteps:
            output = model(images.to(DEVICE), step.to(DEVICE).expand(len(images)), **told).sample.cpu()
            images = sampler.step(output, step, images, generator=random).prev_sample
    return training.bounded(images)
