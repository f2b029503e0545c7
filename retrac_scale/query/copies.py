"""Near-duplicates among the best samples, folded into the best one of their kind."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from retrac_scale.arrays import Bools, Float32, Int64
from retrac_scale.estimators import Estimator
from retrac_scale.estimators.fitting import rows_at
from retrac_scale.index.reader import IndexReader
from retrac_scale.index.scan import Found

ALIKE, ALIKE_UNDER_A_RIDGE = 0.95, 0.7
"""How alike two samples are from which "fold" takes them for copies, chosen by `python -m benchmarks.copies`. A ridge
plays down what all images have in common, so that others are hardly alike."""
FEWEST, MOST = 64, 2048
"""Candidates of a list among which copies are looked for."""
OF_GROUPS = 128
"""The same of groups, of either sign."""


def threshold(duplicates: str | float, estimator: Estimator) -> float | None:
    """How alike samples are from which they are copies of each other; None where they are kept apart."""
    if isinstance(duplicates, str):
        own = ALIKE if estimator.damping is None else ALIKE_UNDER_A_RIDGE
        return own if duplicates == "fold" else None
    return duplicates


def likeness(index: IndexReader, ids: npt.NDArray[Any]) -> Float32:
    """How alike samples of an index are, at most 1, `[m, m]`.

    Of two samples it is the score of either for the other as a query, over that of each for itself, geometric means of
    both: the cosine of their gradients by the estimator's own measure.

    Raises:
        ValueError: the store of the index, which has the samples as queries, was in memory.
    """
    store = index.check_store()
    if store is None:
        raise ValueError("to tell copies, the store that the index was built from is needed; it was in memory.")
    places = index.find(ids)[1]
    order = np.argsort(places)
    asked = np.empty((len(ids), index.shape[0] * index.shape[2]), np.float32)
    for some, rows in rows_at(store, places[order], partial(index.rows_of, store)):
        asked[order[some]] = rows.swapaxes(0, 1).reshape(rows.shape[1], -1)
    rows = index.rows_at(ids)
    for side in (rows, asked):  # by which no likeness changes; products of small or large gradients leave float32
        side /= np.maximum(np.maximum(side.max(1), -side.min(1)), np.finfo(np.float32).tiny)[:, None]
    scores = (rows @ asked.T).astype(np.float64)
    own = np.sqrt(np.where(np.diag(scores) > 0, np.diag(scores), np.inf))  # what is nothing to itself is like nobody
    found = np.sign(scores) * np.sqrt(np.maximum(scores * scores.T, 0)) / own[:, None] / own
    return found.astype(np.float32)


def families(alike: Bools, wanted: int | None = None) -> list[Int64]:
    """Places of candidates, best first, put together: the first of each family, and those left that are like it.

    Args:
        alike: `[m, m]`.
        wanted: how many families; None for all.
    """
    left = np.arange(len(alike))
    found: list[Int64] = []
    while len(left) and (wanted is None or len(found) < wanted):
        own = alike[left[0], left]
        own[0] = True
        found.append(left[own])
        left = left[~own]
    return found


def folded(
    index: IndexReader, candidates: Callable[[int], Found], wanted: int, alike: float
) -> tuple[Found, Int64, npt.NDArray[Any]]:
    """The best families of each lane, each by its best sample, best first.

    Copies are looked for among the best 64, or 4 times as many as are wanted; where that leaves too few families, among
    twice as many, up to 2,048. So a lane's answer does not depend on the others.

    Args:
        index: whose rows are compared.
        candidates: the best samples of each lane, so many of them, best first.
        wanted: families of each lane.
        alike: how alike two samples are from which they are copies.

    Returns:
        What was found, `[lane, f]`; at which places of the candidates; and the copies of each, tuples of ids.
    """
    size = max(FEWEST, 4 * wanted)
    done: dict[int, list[Int64]] = {}
    while True:
        found = candidates(size)
        for lane in (lane for lane in range(len(found.ids)) if lane not in done):
            names = found.ids[lane][found.scores[lane] > -np.inf]
            own = families(likeness(index, names) >= alike, wanted)
            if len(own) == wanted or len(names) < size or size >= MOST:
                done[lane] = own
        if len(done) == len(found.ids):
            break
        size = min(2 * size, MOST) if size < MOST else 2 * size
    width = max(map(len, done.values()))
    places = np.zeros((len(done), width), np.int64)
    copies = np.empty(places.shape, object)
    copies[:] = [[()] * width for _ in done]
    scores = np.full(places.shape, -np.inf)
    for lane, own in done.items():
        for place, members in enumerate(own):
            places[lane, place], scores[lane, place] = members[0], found.scores[lane, members[0]]
            copies[lane, place] = tuple(found.ids[lane][members[1:]].tolist())
    ids = np.take_along_axis(found.ids, places, 1)
    return Found(scores, ids, np.take_along_axis(found.parts, places[..., None], 1)), places, copies


def copies_of_queries(index: IndexReader, found: Found, queries: int, alike: float) -> list[npt.NDArray[Any]]:
    """Ids of all but the first of each family, for each query: those that groups do not count.

    Args:
        index: whose rows are compared.
        found: the best samples of each lane, queries running fastest.
        queries: how many.
        alike: how alike two samples are from which they are copies.
    """
    left_out = []
    for query in range(queries):
        scores, ids = (values[query::queries].ravel() for values in (found.scores, found.ids))
        order = np.argsort(-np.abs(scores), kind="stable")
        names = ids[order][np.isfinite(scores[order])]
        names = names[np.sort(np.unique(names, return_index=True)[1])]  # few samples stand on both sides
        own = families(likeness(index, names) >= alike)
        left_out.append(names[[place for members in own for place in members[1:].tolist()]] if own else names)
    return left_out
