"""Job: all that a block is a function of; and how many rows and threads are fastest for it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import nn

from retrac_scale.arrays import Ids
from retrac_scale.native.memory import keep_freed_pages
from retrac_scale.projections import GradientSketcher, Projection
from retrac_scale.projections.preconditioning import Divisors
from retrac_scale.sketching.calibration import FEW, as_before, fastest, kept_bytes
from retrac_scale.sketching.content import read_again
from retrac_scale.sketching.pairs import Items, measured_pairs
from retrac_scale.store.reader import Words
from retrac_scale.task.checkpoints import Checkpoint
from retrac_scale.task.diffusion import DiffusionTask
from retrac_scale.task.timesteps import Pairs, TimestepPlan

CALIBRATION_ITEMS = 64

_kept: WeakKeyDictionary[nn.Module, dict[str, int]] = WeakKeyDictionary()
"""What a row of items of some shapes keeps of a model's forward pass for the backward pass, in bytes."""


@dataclass(frozen=True, eq=False)
class Job:
    """All that a block is a function of; travels to a worker once."""

    task: DiffusionTask
    dataset: Any
    ids: Ids
    content: Words
    checkpoints: Mapping[str, Checkpoint]
    timesteps: TimestepPlan
    projection: Projection
    parameters: frozenset[str]
    precondition: Mapping[str, Divisors]

    def sketcher(self) -> GradientSketcher:
        """A new one; its first pair is checked where it is used."""
        chosen = self.parameters.__contains__
        return GradientSketcher(self.task.model, self.projection, parameters=chosen, check=False)

    def item(self, row: int) -> tuple[Any, Words]:
        """What the model takes of an item, and its words."""
        item, words = read_again(self.task, self.ids[row], self.dataset[row], self.content[row])
        return self.task.encoded(item), words

    def fastest(
        self, sketcher: GradientSketcher, checkpoint: str, like: Mapping[str, Any] | None = None, sharing: int = 1
    ) -> tuple[int, int]:
        """Rows per backward pass, and threads.

        Args:
            sketcher: of the job.
            checkpoint: one of its.
            like: the plan of the store that this one is to be like, if any.
            sharing: processes that share the machine's memory.
        """
        ids = self.ids[:CALIBRATION_ITEMS]
        items = [self.item(row)[0] for row in range(len(ids))]
        plan = self.timesteps.pairs(checkpoint, ids, self.task.num_train_timesteps)

        def run(rows: int) -> torch.Tensor:
            pairs = np.arange(max(1, rows // plan.draws)) % plan.timesteps.size
            return sketch_pairs(sketcher, self.task, items, ids, plan, pairs)[0][2]

        most, device = len(self.ids) * plan.timesteps.shape[1] * plan.draws, self.task.device
        if like and most <= FEW:  # a question, as another may have been before
            known, kind = (
                _kept.setdefault(self.task.model, {}),
                repr((shapes(items[0]), self.task.autocast, len(self.parameters))),
            )
            if kind not in known:
                known[kind] = kept_bytes(run)
            return as_before(run, most, device, like["batch_rows"], like["threads"], known[kind])
        return fastest(run, most, device, sharing)


def shapes(item: tuple[Any, Mapping[str, Any]]) -> Any:
    """Of what the model takes of an item: of the sample, and of what goes with it, by name."""
    sample, told = item
    return tuple(sample.shape), sorted((name, tuple(value.shape)) for name, value in told.items())


def sketch_pairs(
    sketcher: GradientSketcher, task: DiffusionTask, items: Items, ids: Ids, plan: Pairs, pairs: Any
) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """For each measure sketches `[pairs, k]`, norms, losses `[pairs]`: one forward pass, a backward pass for each."""
    keep_freed_pages()
    with sketcher:
        measured = measured_pairs(task, items, ids, plan, pairs)
        last = len(measured) - 1
        return [
            (*sketcher(values, retain_graph=number < last), losses.detach().float())
            for number, (values, losses) in enumerate(measured)
        ]
