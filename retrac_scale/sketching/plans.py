"""Which timestep plans a call measures by: those that are given, or those of a store."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from retrac_scale.store import SketchStore
from retrac_scale.store.part import measures_in, plans_of
from retrac_scale.task.timesteps import (
    RECOMMENDED,
    EvenlySpaced,
    TimestepPlan,
    grid_from_spec,
    grids_for_queries,
    of_queries,
)

QUERY_PLAN = EvenlySpaced(100, noise="own")
"""Of queries, where the training side was measured where it was trained: S = 100 as in arXiv 2401.09031."""


def plans_for_queries(
    timesteps: TimestepPlan | Sequence[TimestepPlan] | None, store: SketchStore
) -> list[TimestepPlan]:
    """The plans by which queries of a store are measured, see `sketch`."""
    return plans_of_call(timesteps, store, None)


def plans_of_call(
    timesteps: TimestepPlan | Sequence[TimestepPlan] | None, like: SketchStore | None, there: SketchStore | None
) -> list[TimestepPlan]:
    """The plans that are asked for, or those of another store, one after the other."""
    stored = [] if like is None else _of_each_measure(like)
    of_like = grids_for_queries(stored)
    if timesteps is None and there is not None:
        grids = [grid_from_spec(spec) for spec in plans_of(there.fingerprint)]
        if grids and grids == of_like[: len(grids)]:
            return [*of_like]  # the store that they are compared with may have grown since
        if None in grids or not grids:
            raise ValueError(
                f"{there.url} was not measured at the same timesteps for every sample; say where to measure: "
                "timesteps=Recorded(path)."
            )
        return [grid for grid in grids if grid is not None]
    if timesteps is None:
        return [RECOMMENDED] if like is None else [*of_like] or [QUERY_PLAN]
    given: list[TimestepPlan] = list(timesteps) if isinstance(timesteps, Sequence) else [timesteps]
    for plan in given:
        if not hasattr(plan, "pairs") or isinstance(plan, type):
            raise ValueError(f"timesteps must be a plan, such as EvenlySpaced(4), got {plan!r}.")
    if not given:
        raise ValueError("timesteps= got an empty list; give a plan, such as EvenlySpaced(4).")
    return given if like is None else [of_queries(plan, stored) for plan in given]


def _of_each_measure(store: SketchStore) -> list[dict[str, Any]]:
    """A store's plans, once where several measures stand side by side."""
    plans = plans_of(store.fingerprint)
    return plans[: len(plans) // len(measures_in(store.fingerprint))]
