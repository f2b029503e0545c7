"""Some samples of a store, as a store of their own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from retrac_scale.store.part import plans_of
from retrac_scale.store.reader import SketchStore
from retrac_scale.store.schema import CONTENT, SKETCHED
from retrac_scale.store.writer import create_store, write_block


def take(store: SketchStore, ids: Sequence[Any] | npt.NDArray[Any]) -> SketchStore:
    """Some samples of a store as a small store in memory, e.g. to query with training samples.

    Raises:
        ValueError: an id is not in the store.
    """
    asked = np.asarray(ids)
    chosen = store.places.find(asked)
    if (chosen < 0).any():
        raise ValueError(f"{store.url or 'the store'} has no sample {asked[chosen < 0].tolist()[0]!r}.")
    return taken(store, chosen, store.columns_of(chosen))


def taken(store: SketchStore, chosen: npt.NDArray[np.int64], columns: Mapping[str, npt.NDArray[Any]]) -> SketchStore:
    """As `take`, of the samples at some places of a store, with their values `[m]` of some columns."""
    _, t, k = store.shape
    quantities = [name for name in SKETCHED if store.has(name)]
    fingerprint = store.fingerprint
    if "timesteps" in fingerprint:
        fingerprint["timesteps"] = plans_of(fingerprint)  # their digests are those of other samples
    small = create_store(
        None,
        shape=(len(chosen), t, k),
        ids=store.ids[chosen],
        weights=store.weights,
        fingerprint=fingerprint,
        dtype="float32",
        quantities=quantities,
        columns=columns,
        plan=store.plan,
    )

    for checkpoint in store.checkpoints:
        for number, block in enumerate(small.blocks):
            places = chosen[block]
            write_block(
                small,
                checkpoint,
                number,
                *store.sketches_and_norms(checkpoint, places),
                losses=store.losses(checkpoint, places) if "loss" in quantities else None,
                timesteps=store.timesteps(checkpoint, places) if "timestep" in quantities else None,
                contents=store.contents(checkpoint, places) if CONTENT in quantities else None,
            )
    return small
