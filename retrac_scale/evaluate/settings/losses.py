"""The loss of queries under a model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from retrac_scale.evaluate.settings.images import Images
from retrac_scale.evaluate.settings.training import DEVICE
from retrac_scale.task.diffusion import DiffusionTask
from retrac_scale.task.timesteps import draw_noise

TIMESTEPS, DRAWS = 50, 2


@dataclass(frozen=True, eq=False)
class Losses:
    """`losses(weights)`: the loss of each query, `[q]`, over the middles of 50 intervals and two noises of its own.

    Attributes:
        images: the queries.
        model: into which weights are loaded.
        scheduler: as in training.
    """

    images: Images
    model: Any
    scheduler: Any

    @property
    def key(self) -> str:
        """A digest of the queries."""
        return self.images.digest

    def __call__(self, weights: dict[str, Any]) -> Any:
        """Means over timesteps and noises, float64."""
        shape, ids = self.images.images.shape[1:], np.arange(len(self.images))
        task = DiffusionTask(self.model, self.scheduler, device=DEVICE)
        task.load("measured", weights)
        width = task.num_train_timesteps / TIMESTEPS
        total = torch.zeros(len(ids), dtype=torch.float64)
        with torch.no_grad():
            for step in ((np.arange(TIMESTEPS) + 0.5) * width).astype(np.int64):
                steps = np.full(len(ids), step)
                for draw in range(DRAWS):
                    noise = draw_noise(shape, ids, steps, 0, draw=draw)
                    told = dict(self.images.given)
                    total += task.losses(self.images.images, torch.from_numpy(steps), noise, told).cpu()
        return (total / (TIMESTEPS * DRAWS)).numpy()
