"""Samples to be measured, and samples already measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import InitVar, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from retrac_scale.columns import check_ids
from retrac_scale.sketching.request import Request
from retrac_scale.sketching.sketch import sketched
from retrac_scale.store import SketchStore, create_store, write_block
from retrac_scale.store.part import plans_of
from retrac_scale.store.schema import CONTENT, SKETCHED
from retrac_scale.task.checkpoints import Checkpoint
from retrac_scale.task.concepts import Concept, Concepts
from retrac_scale.task.diffusion import DiffusionTask
from retrac_scale.task.items import dataset_ids
from retrac_scale.task.regions import Regions
from retrac_scale.task.timesteps import TimestepPlan


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
    """

    dataset: Any
    task: DiffusionTask
    checkpoints: Mapping[str, Checkpoint]
    timesteps: TimestepPlan | Sequence[TimestepPlan] | None = None
    region: InitVar[Any] = None
    concept: InitVar[Concept | Mapping[str, Concept] | None] = None

    def __post_init__(self, region: Any, concept: Concept | Mapping[str, Concept] | None) -> None:
        if region is not None:
            object.__setattr__(self, "dataset", Regions(self.dataset, region))
        if concept is not None:
            object.__setattr__(self, "dataset", Concepts(self.dataset, concept))

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


def take(store: SketchStore, ids: Sequence[Any] | npt.NDArray[Any]) -> SketchStore:
    """Some samples of a store as a small store in memory, e.g. to query with training samples.

    Raises:
        ValueError: an id is not in the store.
    """
    asked = np.asarray(ids)
    chosen = store.places.find(asked)
    if (chosen < 0).any():
        raise ValueError(f"{store.url or 'the store'} has no sample {asked[chosen < 0].tolist()[0]!r}.")
    return taken(store, chosen, store.columns)


def taken(store: SketchStore, chosen: npt.NDArray[np.int64], columns: Mapping[str, npt.NDArray[Any]]) -> SketchStore:
    """As `take`, of the samples at some places of a store, with some of its columns."""
    _, t, k = store.shape
    quantities = [name for name in SKETCHED if store.has(name)]
    fingerprint = store.fingerprint
    if "timesteps" in fingerprint:
        fingerprint["timesteps"] = plans_of(fingerprint)  # their digests are those of other samples
    taken = create_store(
        None,
        shape=(len(chosen), t, k),
        ids=store.ids[chosen],
        weights=store.weights,
        fingerprint=fingerprint,
        dtype="float32",
        quantities=quantities,
        columns={name: values[chosen] for name, values in columns.items()},
        plan=store.plan,
    )

    def gather(read: Any, checkpoint: str, block: slice) -> Any:
        return np.concatenate([read(checkpoint, slice(place, place + 1)) for place in chosen[block]])

    for checkpoint in store.checkpoints:
        for number, block in enumerate(taken.blocks):
            write_block(
                taken,
                checkpoint,
                number,
                gather(store.sketches, checkpoint, block),
                gather(store.norms, checkpoint, block),
                losses=gather(store.losses, checkpoint, block) if "loss" in quantities else None,
                timesteps=gather(store.timesteps, checkpoint, block) if "timestep" in quantities else None,
                contents=gather(store.contents, checkpoint, block) if CONTENT in quantities else None,
            )
    return taken
