"""Samples to be measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import InitVar, dataclass
from typing import Any

import numpy.typing as npt

from retrac_scale.columns import check_ids
from retrac_scale.sketching.request import Request
from retrac_scale.sketching.sketch import sketched
from retrac_scale.store import SketchStore
from retrac_scale.task.checkpoints import Checkpoint
from retrac_scale.task.concepts import Concept, Concepts
from retrac_scale.task.diffusion import DiffusionTask
from retrac_scale.task.items import dataset_ids
from retrac_scale.task.regions import Regions
from retrac_scale.task.timesteps import TimestepPlan
from retrac_scale.task.views import Views


@dataclass(frozen=True, eq=False)
class Samples:
    """A dataset and how its gradients are measured: what `sketch` takes, kept together.

    Attributes:
        dataset: map-style, as for `sketch`.
        task: what is differentiated.
        checkpoints: {name: state dict, path, or callable}.
        timesteps: `EvenlySpaced(count)`, `Explicit([...])`, `Recorded(path)`; a list of those that a store grew by;
            None for those of the store that they are compared with.
        region: the part of each picture that is asked about, as for `Regions`, which the dataset then is one of; None
            for all of it.
        concept: that the pictures are asked about for, as for `Concepts`; None for the loss.
        views: whether each is asked about as it is, moved, of another size and light, see `Views`: a training sample's
            score then is the best that any of the nine views gives it.
    """

    dataset: Any
    task: DiffusionTask
    checkpoints: Mapping[str, Checkpoint]
    timesteps: TimestepPlan | Sequence[TimestepPlan] | None = None
    region: InitVar[Any] = None
    concept: InitVar[Concept | Mapping[str, Concept] | None] = None
    views: InitVar[bool] = False

    def __post_init__(self, region: Any, concept: Concept | Mapping[str, Concept] | None, views: bool) -> None:
        if region is not None:
            object.__setattr__(self, "dataset", Regions(self.dataset, region))
        if concept is not None:
            object.__setattr__(self, "dataset", Concepts(self.dataset, concept))
        if views:
            object.__setattr__(self, "dataset", Views(self.dataset))

    @property
    def ids(self) -> npt.NDArray[Any]:
        """Sample ids `[n]`."""
        return check_ids(dataset_ids(self.dataset), len(self.dataset))

    @property
    def plans(self) -> list[TimestepPlan]:
        """The timestep plans, mostly one.

        Raises:
            ValueError: there are none, and no store to take them from.
        """
        if self.timesteps is None:
            raise ValueError("say where to measure the samples: Samples(..., timesteps=EvenlySpaced(4)).")
        return list(self.timesteps) if isinstance(self.timesteps, Sequence) else [self.timesteps]

    def sketch(self, like: SketchStore) -> SketchStore:
        """Their sketches in memory, float32, made as those of another store.

        Raises:
            ValueError: they do not fit the other store.
        """
        request = Request(self.task, self.dataset, None, self.checkpoints, dtype="float32", like=like, progress=False)
        return sketched(request, self.timesteps)
