"""Ridges fitted to the training rows, out of core, and rows a few at a time."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from retrac_scale.estimators import Estimator
from retrac_scale.estimators.ridge import Damping, Moments, Ridge, moments, solve
from retrac_scale.execution import compute, delayed
from retrac_scale.store import SketchStore, open_store
from retrac_scale.store.encoding import Float32
from retrac_scale.store.schema import Url, blocks

if TYPE_CHECKING:
    from distributed import Client

PIECE_BYTES = 64 * 2**20
RUN_ROWS = 16384
"""Rows whose moments one task adds up, however many workers there are, so that the sums are the same everywhere."""

Places = npt.NDArray[np.int64]


def rows_at(store: SketchStore, places: Places, make: Callable[[slice], Float32]) -> Iterator[tuple[slice, Float32]]:
    """Rows of the samples at some ascending places of a store, and which of the places they are, some at a time.

    Args:
        store: whose samples.
        places: `[n]`.
        make: gives the rows of a range of samples.
    """
    _, t, k = store.shape
    step = max(1, PIECE_BYTES // (4 * t * k))
    stop = 0
    while (start := stop) < len(places):  # a piece is at most `step` samples of the store, others between them included
        stop = int(np.searchsorted(places, places[start] + step))
        piece = slice(int(places[start]), int(places[stop - 1]) + 1)
        yield slice(start, stop), make(piece)[places[start:stop] - piece.start]


def fit(store: SketchStore, estimator: Estimator, places: Places, client: Client | None) -> dict[str, Ridge]:
    """For each checkpoint the ridge over an estimator's rows; nothing where it has no damping.

    Args:
        store: the training side.
        estimator: makes the rows.
        places: of the samples that count, `[n]`.
        client: a `distributed.Client` whose workers reach the store; None computes on threads here.
    """
    if estimator.damping is None:
        return {}
    source: SketchStore | Url = store if client is None else store.url
    run = delayed(functools.partial(_moments_of_run, source, store.fingerprint.get("measure"), estimator), "moments")
    add, finish = delayed(_sum, "sum"), delayed(_solve, "solve")
    dual = len(places) < estimator.width(store)
    found = []
    for name in store.checkpoints:
        level = [run(name, places[part], dual) for part in blocks(len(places), RUN_ROWS)]
        while len(level) > 1:
            level = [add(level[i : i + 2]) for i in range(0, len(level), 2)]
        found.append(finish(level[0], estimator.damping, name))
    return dict(zip(store.checkpoints, compute(found, client), strict=True))


def _moments_of_run(
    source: SketchStore | Url, measure: str | None, estimator: Estimator, name: str, places: Places, dual: bool
) -> Moments:
    store = source if isinstance(source, SketchStore) else open_store(source, measure=measure)
    rows = (rows for _, rows in rows_at(store, places, lambda samples: estimator.rows(store, name, samples)))
    return moments(rows, estimator.width(store), dual=dual)


def _sum(parts: list[Moments]) -> Moments:
    return parts[0] if len(parts) == 1 else parts[0] + parts[1]


def _solve(total: Moments, damping: Damping, name: str) -> Ridge:
    try:
        return solve(total, damping)
    except ValueError as error:
        raise ValueError(f"checkpoint {name!r}: {error}") from None
