"""Ridges fitted to the training rows, out of core, and rows a few at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial, reduce
from types import MappingProxyType
from typing import TYPE_CHECKING

import numpy as np

from retrac_scale.arrays import Float32
from retrac_scale.arrays import Int64 as Places
from retrac_scale.estimators import Estimator, common_timesteps
from retrac_scale.estimators.ridge import Damping, Moments, Ridge, solve
from retrac_scale.runtime.graphs import compute, delayed
from retrac_scale.store import SketchStore, StoreHandle
from retrac_scale.store.schema import blocks

if TYPE_CHECKING:
    from distributed import Client

PIECE_BYTES = 16 * 2**20
RUN_ROWS = 16384
"""Rows whose moments one task adds up, however many workers there are, so that the sums are the same everywhere."""


def rows_at(store: SketchStore, places: Places, make: Callable[[Places], Float32]) -> Iterator[tuple[slice, Float32]]:
    """What is made of the samples at some places of a store, and which of the places they are, some at a time.

    Args:
        store: whose samples.
        places: `[n]`; every block is read once or twice where they ascend.
        make: gives it for some of the places.
    """
    _, t, k = store.shape
    for some in blocks(len(places), max(1, PIECE_BYTES // (4 * t * k))):
        yield some, make(places[some])


def fit(
    store: SketchStore,
    estimator: Estimator,
    places: Places,
    client: Client | None,
    done: Callable[[int], object] = lambda rows: None,
    before: Mapping[str, list[Moments]] = MappingProxyType({}),
) -> dict[str, list[Ridge]]:
    """For each checkpoint the ridges over an estimator's rows, one for each part; nothing where it has no damping.

    Args:
        store: the training side.
        estimator: makes the rows.
        places: of the samples that count, `[n]`.
        client: a `distributed.Client` whose workers reach the store; None computes on threads here.
        done: told of rows that have been gone through, in all of each checkpoint's once.
        before: moments of further samples.
    """
    if estimator.damping is None:
        return {}
    steps = common_timesteps(store) if estimator.pairing == "matched" else None
    dual = not before and len(places) < store.shape[2]
    found = moments(store, estimator, places, client, done, dual=dual)
    totals = {name: _sum([side[name] for side in (before, found) if side]) for name in store.checkpoints}
    return {name: _solve(total, estimator.damping, name, steps) for name, total in totals.items()}


def moments(
    store: SketchStore,
    estimator: Estimator,
    places: Places,
    client: Client | None,
    done: Callable[[int], object] = lambda rows: None,
    *,
    dual: bool = False,
) -> dict[str, list[Moments]]:
    """For each checkpoint the moments of an estimator's rows, one for each part; nothing where there are no places."""
    if not len(places):
        return {}
    run, add = delayed(partial(_moments_of_run, StoreHandle.of(store, client), estimator)), delayed(_sum)
    found, rows = [], dict[str, int]()
    for name in store.checkpoints:
        parts = [places[part] for part in blocks(len(places), RUN_ROWS)]
        level = [run(name, part, dual) for part in parts]
        rows |= {one.key: len(part) for one, part in zip(level, parts, strict=True)}
        while len(level) > 1:
            level = [add(level[i : i + 2]) for i in range(0, len(level), 2)]
        found.append(level[0])
    sums = compute(found, client, lambda key: done(rows.pop(key, 0)))
    done(sum(rows.values()))  # by workers
    return dict(zip(store.checkpoints, sums, strict=True))


def _moments_of_run(source: StoreHandle, estimator: Estimator, name: str, places: Places, dual: bool) -> list[Moments]:
    store = source.open()
    pieces = (
        [Moments.of(part, estimator.damping or 0, dual=dual) for part in np.split(rows, estimator.parts(store), axis=1)]
        for _, rows in rows_at(store, places, lambda samples: estimator.rows(store, name, samples))
    )
    return reduce(_add, pieces)


def _add(one: list[Moments], other: list[Moments]) -> list[Moments]:
    return [a + b for a, b in zip(one, other, strict=True)]


def _sum(every: list[list[Moments]]) -> list[Moments]:
    return reduce(_add, every)


def _solve(totals: list[Moments], damping: Damping, name: str, steps: list[int] | None) -> list[Ridge]:
    found = []
    for part, total in enumerate(totals):
        try:
            found.append(solve(total, damping))
        except ValueError as error:
            where = f", timestep {steps[part]}" if steps else f", measurement {part + 1}" if len(totals) > 1 else ""
            raise ValueError(f"checkpoint {name!r}{where}: {error}") from None
    return found
