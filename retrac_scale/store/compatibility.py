"""Whether the sketches of two stores may be multiplied."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from retrac_scale.store.part import plans_of
from retrac_scale.store.schema import differences

COMPARED = ("projection", "parameters", "checkpoints", "measure", "scheduler", "frozen")


def check_compatible(
    train: Mapping[str, Any], train_checkpoints: list[str], queries: Mapping[str, Any], query_checkpoints: list[str]
) -> None:
    """Compare the fingerprints and checkpoint names of the training side and of the queries.

    Raises:
        ValueError: they were sketched otherwise; says which field differs and what to do.
    """
    found = differences(*of_both({k: train.get(k) for k in COMPARED}, {k: queries.get(k) for k in COMPARED}))
    if not found and set(train_checkpoints) != set(query_checkpoints):
        found = [f"checkpoints are {train_checkpoints} there and {query_checkpoints} here"]
    if found:
        raise ValueError(
            f"the queries do not fit the training sketches: {'; '.join(found)}; "
            "sketch the queries with like=store and the same checkpoints."
        )
    check_noise(train, queries)


def check_noise(train: Mapping[str, Any], queries: Mapping[str, Any]) -> None:
    """Raise ValueError where a training side under common noise meets queries that did not see that noise."""
    common = {plan.get("seed", 0) for plan in plans_of(train) if plan.get("noise") == "common"}
    for plan in plans_of(queries) if common else ():
        if plan.get("noise") != "common" or plan.get("seed", 0) not in common:
            seeds = " and ".join(str(seed) for seed in sorted(common))
            theirs = f"common noise of seed {plan.get('seed', 0)}" if "noise" in plan else "noise of their own"
            raise ValueError(
                f"the training samples were measured under common noise of seed {seeds}, the queries under {theirs}; "
                "scores would be the luck of two draws. Sketch the queries with like=store and without timesteps=."
            )


def slots(fingerprint: Mapping[str, Any]) -> list[tuple[Any, ...]]:
    """What each measurement of a sample sees under common noise, (seed, draws); in the order of its timesteps."""
    found: list[tuple[Any, ...]] = []
    for plan in plans_of(fingerprint):
        seen = (plan.get("seed", 0), plan.get("draws", 1)) if plan.get("noise") == "common" else ()
        found += [seen] * int(plan.get("count", len(plan.get("timesteps", " "))))
    return found


def of_both(train: Mapping[str, Any], queries: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The fingerprints with those frozen parts that both name: latents and embeddings may come without an encoder."""
    left, right = train.get("frozen") or {}, queries.get("frozen") or {}
    names = left.keys() & right.keys()
    return (
        {**train, "frozen": {name: left[name] for name in names}},
        {**queries, "frozen": {name: right[name] for name in names}},
    )
