"""Values to be differentiated and losses of (sample, timestep, noise) pairs."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from retrac_scale.arrays import Ids
from retrac_scale.gradients.nested import mapped
from retrac_scale.task.diffusion import DiffusionTask
from retrac_scale.task.timesteps import Pairs, draw_noise

Items = Sequence[Any] | Mapping[int, Any]
"""What `DiffusionTask.check_item` gives for samples of a block, by number: the first one and those asked for."""


def measured_pairs(
    task: DiffusionTask, items: Items, ids: Ids, plan: Pairs, pairs: Any
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Values to be differentiated and losses of some pairs of a block, means over their noise draws, `[pairs]` each.

    One of each for every measure of the task.
    """
    rows, columns = np.divmod(pairs, plan.timesteps.shape[1])
    steps, seeds = plan.timesteps[rows, columns], plan.seeds[rows, columns]
    images = torch.stack([items[row][0] for row in rows])
    whose = None if plan.noise == "common" else ids[rows]
    noise = torch.stack(
        [draw_noise(images.shape[1:], whose, steps, seeds, draw=draw) for draw in range(plan.draws)], dim=1
    )
    for row in rows:
        if items[row][1].keys() != items[0][1].keys():
            raise ValueError(
                f"sample {ids[row]} brings {sorted(items[row][1])} and sample {ids[0]} {sorted(items[0][1])}; "
                "give all samples the same conditioning."
            )
    conditioning = {key: torch.stack([items[row][1][key] for row in rows]) for key in items[0][1]}

    def repeat(x: torch.Tensor) -> torch.Tensor:
        return x.repeat_interleave(plan.draws, 0)

    found = task.measured(
        repeat(images),
        repeat(torch.from_numpy(steps)),
        noise.flatten(0, 1).to(images.dtype),
        {key: repeat(value) for key, value in conditioning.items()},
    )
    shape = (len(pairs), plan.draws)
    return [(values.reshape(shape).mean(1), losses.reshape(shape).mean(1)) for values, losses in found]


def without_autocast(task: DiffusionTask, items: Items) -> tuple[DiffusionTask, Items]:
    """The same without mixed precision, for a check whose tolerance is not that of 16 bits."""
    if task.autocast is None:
        return task, items
    full = copy.copy(task)
    full.autocast = None
    numbered = items.items() if isinstance(items, Mapping) else enumerate(items)
    return full, {row: mapped(item, lambda x: x.float() if x.is_floating_point() else x) for row, item in numbered}
