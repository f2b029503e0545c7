"""Measuring a store again and again until its answers repeat."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

from retrac_scale.estimators import recommended
from retrac_scale.measurement.repeatability import repeatability
from retrac_scale.store import SketchStore
from retrac_scale.store.part import plans_of
from retrac_scale.store.schema import Url
from retrac_scale.task.timesteps import Grid, TimestepPlan, grid_from_spec

logger = logging.getLogger(__name__)


def check_until(until: float, at_most: int, plans: Sequence[TimestepPlan], out: Url, like: SketchStore | None) -> None:
    """Raise ValueError unless a store can be measured again and again."""
    if not 0 < until < 1:
        raise ValueError(f"until is an overlap of lists between 0 and 1, such as 0.9, got {until!r}.")
    if not isinstance(at_most, int) or at_most < 2:
        raise ValueError(f"at_most must be an integer of 2 or more, got {at_most!r}.")
    if out is None:
        raise ValueError("until= adds to a store that is there; give out= a path or URL.")
    if like is not None:
        raise ValueError("until= is for the training side; queries are measured as it was, leave until= out.")
    for plan in plans:
        if not isinstance(plan, Grid):
            raise ValueError(
                f"until= measures every sample again under new noise, but {plan!r} has one pair for each, the one that "
                "it was trained at; give a grid, such as EvenlySpaced(4), or leave until= out."
            )


def grown_until(
    store: SketchStore,
    until: float,
    at_most: int,
    again: Callable[[int], Grid],
    measured: Callable[[TimestepPlan], SketchStore],
    measures: Sequence[str],
) -> SketchStore:
    """Measure a store again and again until its answers, of all measures added up, repeat.

    Warns where the budget ends before.
    """
    stored = plans_of(store.fingerprint)
    if not store.is_complete:  # a call that was interrupted
        for begun in map(grid_from_spec, stored[1:]):
            store = store if begun is None else measured(begun)
    each, number = store.parts[0].shape[1], 1
    while True:
        times, room = len(stored), (at_most - store.shape[1]) // each
        told = None if store.shape[1] == 1 else repeatability(_added_up(store, measures))
        wanted = 2 if told is None else told.needed(until)
        # no more than double: what is foretold is measured on the way
        more = min(room, max(0, -(-(wanted - store.shape[1]) // each)), times)
        if more <= 0:
            if wanted > store.shape[1]:
                logger.warning("%s: %s: not %g; raise at_most=%d to go on.", store.url, told, until, at_most)
            return store
        while len(stored) < times + more:
            number += 1
            if (another := again(number)).spec() not in stored:
                store = measured(another)
                stored = plans_of(store.fingerprint)


def _added_up(store: SketchStore, measures: Sequence[str]) -> SketchStore:
    """The store under all measures, where the recommended estimator adds up their scores, else under its own."""
    together = store.under(*measures)
    return together if recommended(together).pairing == "matched" else store
