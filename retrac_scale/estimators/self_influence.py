"""Self-influence: the diagonal of the scores, in N steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from retrac_scale.arrays import Float32
from retrac_scale.estimators import Estimator, common_timesteps
from retrac_scale.estimators.fitting import fit
from retrac_scale.estimators.ridge import Ridge
from retrac_scale.runtime.runs import results
from retrac_scale.runtime.tasks import Task
from retrac_scale.store import SketchStore, StoreHandle
from retrac_scale.store.compatibility import check_compatible, slots

if TYPE_CHECKING:
    from distributed import Client


def self_influence(
    store: SketchStore, estimator: Estimator, *, queries: SketchStore | None = None, client: Client | None = None
) -> Float32:
    """Score of every sample with itself as the query, float32 `[n]`, block by block; NaN for deleted samples.

    Values stand in the order of `store.ids`. NumPy sorts NaN behind all numbers; `store.alive` tells the others.

    Under a ridge it is the sample's leverage: how much of its own gradient no other sample explains.

    With one recorded timestep per sample, ReTrac's direction is compared with itself and carries no information; give
    `queries`, the same samples sketched at the query timesteps, to have the paper's score.

    Args:
        store: the training side.
        estimator: TracIn(), ReTrac(), ...; one that fits a ridge fits it to the samples that are not deleted.
        queries: the query side, with the same ids in the same order; default: the store itself.
        client: a `distributed.Client` whose workers reach the stores; None computes on threads here.
    """
    estimator.check_training(store)
    if queries is not None:
        estimator.check(queries)
        check_compatible(store.fingerprint, store.checkpoints, queries.fingerprint, queries.checkpoints)
        if not np.array_equal(store.ids, queries.ids):
            raise ValueError("self_influence needs queries with the same ids in the same order as the store.")
        if estimator.pairing == "matched":
            if common_timesteps(store) != common_timesteps(queries):
                raise ValueError("matched pairing needs the same timesteps on both sides; use pairing='cross'.")
            here = slots(store.fingerprint)
            if any(here) and here != slots(queries.fingerprint):
                raise ValueError("matched pairing needs the same noise on both sides, in the same order.")
    left = StoreHandle.of(store, client)
    right = None if queries is None else StoreHandle.of(queries, client)
    ridges = fit(store, estimator, np.flatnonzero(store.alive), client)
    tasks = [Task(f"self-influence-samples-{block.start}-{block.stop}", (block,)) for block in store.blocks]
    parts = results(_self_influence_of_block, tasks, client, shared=(left, right, estimator, ridges))
    values: Float32 = np.concatenate(parts).astype(np.float32)
    values[store.deleted if queries is None else store.deleted | queries.deleted] = np.nan
    return np.square(values) if estimator.squared else values


def _self_influence_of_block(
    common: tuple[StoreHandle, StoreHandle | None, Estimator, Mapping[str, Sequence[Ridge]]],
    samples: slice,
) -> npt.NDArray[np.float64]:
    left, right, estimator, ridges = common
    store, queries = left.open(), None if right is None else right.open()
    total = np.zeros(samples.stop - samples.start)
    for checkpoint, weight in store.weights.items():
        own = ridges.get(checkpoint, ())
        rows = estimator.train_rows(store, checkpoint, samples, own)
        alike = queries is None and not own
        other = rows if alike else estimator.query_rows(queries or store, checkpoint, samples, own)
        total += weight * np.einsum("nk,nk->n", rows, other, dtype=np.float64)
    return total
