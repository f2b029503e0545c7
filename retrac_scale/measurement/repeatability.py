"""How far two honest runs would agree, told from one: a store's measurements are split, and the parts compared."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from retrac_scale.arrays import Float32, Float64
from retrac_scale.arrays import Int64 as Int64
from retrac_scale.estimators import Estimator, recommended
from retrac_scale.index.build import write_index
from retrac_scale.index.reader import IndexReader
from retrac_scale.measurement.halves import (
    MeasuredOnceError,
    Places,
    Repeatability,
    correlation,
    list_length,
    pairs_of_parts,
    repeatability_of_index,
    shared,
    some_ids,
)
from retrac_scale.query.answer import answer_rows
from retrac_scale.query.question import Question
from retrac_scale.query.source import all_scores_of
from retrac_scale.store import SketchStore
from retrac_scale.store.part import plans_of
from retrac_scale.store.taking import take
from retrac_scale.store.view import StoreView

if TYPE_CHECKING:
    from distributed import Client

CROSS_SIZES, CROSS_SPLITS = 2, 3
"""Fewer than under matched pairing: each part of the measurements needs an index of its own."""


def repeatability(
    store: SketchStore | IndexReader,
    queries: SketchStore | None = None,
    estimator: Estimator | None = None,
    k: int = 10,
    *,
    client: Client | None = None,
) -> Repeatability:
    """Split a store's measurements into parts, answer with each, and tell how far two whole runs would agree.

    Timesteps (draws and visits that stand as such) are split; where every sample was measured once at each of several
    checkpoints under noise of its own, checkpoints are, which tells too little rather than too much. Under matched
    pairing one index serves all parts; under cross pairing each part has an index of its own in memory.

    Args:
        store: the training side; or an index of it with matched pairing, which saves building one.
        queries: a store of queries; None asks with a few training samples, each left out of its own list.
        estimator: None for the recommended one, or that of the index.
        k: length of the lists, at most half of the samples that there are to list.
        client: a `distributed.Client`, for matched pairing.

    Returns:
        overlap of top-k lists and rank correlation of scores, with intervals over queries and splits, and `needed`.

    Raises:
        MeasuredOnceError: there is one measurement, which cannot tell.
        ValueError: the queries do not fit, or there are fewer than two samples to list.
    """
    if isinstance(store, IndexReader):
        if estimator is not None and estimator != store.estimator:
            raise ValueError(f"the index is of {store.estimator}; leave estimator out, or give the store for another.")
        return repeatability_of_index(store, queries, k, client=client)
    estimator = recommended(store) if estimator is None else estimator
    if estimator.pairing == "matched":
        if store.shape[1] < 2:
            pairs_of_parts(1)
        return repeatability_of_index(write_index(store, estimator, client=client)[0], queries, k, client=client)
    return _of_views(store, take(store, some_ids(store)) if queries is None else queries, estimator, k, queries is None)


def _of_views(
    store: SketchStore, queries: SketchStore, estimator: Estimator, k: int, exclude_self: bool
) -> Repeatability:
    """Under cross pairing: an index of each part of the training side, asked by a part of the queries' timesteps."""
    t, s, names = store.shape[1], queries.shape[1], store.checkpoints
    common = any(plan.get("noise") == "common" for plan in plans_of(store.fingerprint))
    by_checkpoint = t == 1 and not common
    units = len(names) if by_checkpoint else t
    pairs = {m: some[:CROSS_SPLITS] for m, some in list(pairs_of_parts(units).items())[:CROSS_SIZES]}
    k = list_length(k, int(store.alive.sum()) - exclude_self)
    question = Question(k, "proponents", None, None, "sum", exclude_self)
    asked_by = _sums_of_checkpoints if by_checkpoint else _means_of_timesteps
    asked = asked_by(store, queries, estimator, [tuple(range(s))[side::2] if s > 1 else (0,) for side in (0, 1)])
    answers: dict[tuple[Places, int], tuple[Int64, Float64]] = {}

    def answered(part: Places, side: int) -> tuple[Int64, Float64]:
        """Lists `[q, k]` and scores `[q, n]` of one side of a pair."""
        if (part, side) not in answers:
            index, rows = asked(part, side)
            lists = answer_rows(index, rows, queries.ids, question).ids
            answers[part, side] = lists, all_scores_of(index, rows, index.shape[1])
        return answers[part, side]

    compared = {m: [(answered(one, 0), answered(other, 1)) for one, other in some] for m, some in pairs.items()}
    overlaps = {m: np.stack([shared(a[0], b[0]) for a, b in some]) for m, some in compared.items()}
    correlations = np.stack([correlation(a[1], b[1]) for a, b in compared[units // 2]])
    return Repeatability(k, units, overlaps, correlations)


AskedBy = Callable[[Places, int], tuple[IndexReader, Float32]]
"""Gives an index and queries' rows `[c, q, k]` for a part of the measurements and one of two sides."""


def _means_of_timesteps(
    store: SketchStore, queries: SketchStore, estimator: Estimator, sides: Sequence[Places]
) -> AskedBy:
    names = store.checkpoints

    def asked(part: Places, side: int) -> tuple[IndexReader, Float32]:
        index, _ = write_index(StoreView(store, names, part), estimator, dtype="float32")
        places = part if queries.shape[1] == store.shape[1] else sides[side]
        return index, index.query_rows(StoreView(queries, names, places))

    return asked


def _sums_of_checkpoints(
    store: SketchStore, queries: SketchStore, estimator: Estimator, sides: Sequence[Places]
) -> AskedBy:
    index, _ = write_index(store, estimator)
    of_all = [index.query_rows(StoreView(queries, store.checkpoints, places)) for places in sides]

    def asked(part: Places, side: int) -> tuple[IndexReader, Float32]:
        rows = np.zeros_like(of_all[side])  # which leaves out a score's other checkpoints
        rows[list(part)] = of_all[side][list(part)]
        return index, rows

    return asked


__all__ = ["MeasuredOnceError", "Repeatability", "repeatability"]
