"""How far lists can be trusted: what is measured of it where that is cheap, and how the page tells it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from retrac_scale.evaluate.intervals import Interval
from retrac_scale.index.reader import StaleIndexError
from retrac_scale.measurement.halves import Repeatability, repeatability_of_rows
from retrac_scale.measurement.repeatability import repeatability
from retrac_scale.query.index import Index
from retrac_scale.store import DamagedStoreError, SketchStore
from retrac_scale.store.schema import blocks

SMALL = 2**28
"""Entries of a store, and scores of its samples, up to which indexes of its parts are built, as cross pairing needs."""
SCORES = 16
"""What a score counts beside an entry: those of all parts are held at a time, in float64."""
AT_ONCE = 32
"""Queries whose parts are asked in one scan."""
LUCK = 0.5
"""Where fewer of the names would come again, the sentence says what the others are."""
BY_CHANCE = 0.05
"""Share of all samples in a list from which on chance alone is worth a word."""
Told = Repeatability | str
"""Or a sentence why it cannot be told."""


def repeatability_for_page(index: Index, queries: SketchStore, k: int, small: int = SMALL) -> Told:
    """How far the lists of these queries would come again, or a sentence why that is not told.

    Under matched pairing a few scans tell; under cross pairing the store, where it is `small`.

    Raises:
        StaleIndexError: the index no longer belongs to its store.
        DamagedStoreError: one of them is damaged.
    """
    try:
        if index.estimator.pairing == "matched":
            rows = index.query_rows(queries)
            parts = blocks(len(queries.ids), AT_ONCE)
            return joined([repeatability_of_rows(index, rows[:, part], queries.ids[part], k) for part in parts])
        store = index.check_store()
        if store is None:
            return "not measured, because the store that the index was built from was in memory."
        n, t, width = store.shape
        if n * (t * width * len(store.checkpoints) + SCORES * len(queries.ids)) > small:
            return "not measured, because that would take an index for each part of a large store."
        return repeatability(store, queries, index.estimator, k)
    except (StaleIndexError, DamagedStoreError):  # which says nothing of the lists, and may be otherwise soon
        raise
    except ValueError as error:  # measured once, or a part that cannot be indexed: the page says so
        return str(error)


def joined(parts: Sequence[Told]) -> Told:
    """What several groups of queries tell together."""
    known = [part for part in parts if isinstance(part, Repeatability)]
    if len(known) < len(parts):
        return next(part for part in parts if isinstance(part, str))
    overlaps = {m: np.concatenate([one.overlaps[m] for one in known], axis=1) for m in known[0].overlaps}
    correlations = np.concatenate([one.correlations for one in known], axis=1)
    return Repeatability(known[0].k, known[0].measurements, overlaps, correlations)


def told(found: Told, samples: int | None = None) -> dict[str, Any]:
    """A sentence and, where it is known, the numbers behind it, as the page holds them.

    Args:
        found: of one estimator.
        samples: how many could stand in a list, where that is known.
    """
    if isinstance(found, str):
        return {"sentence": found}
    return {
        "sentence": _sentence(found, samples),
        "k": found.k,
        "measurements": found.measurements,
        "halves": _ends(found.halves),
        "overlap": _ends(found.overlap),
        "correlation": _ends(found.rank_correlation),
    }


def shared_by_halves(found: Repeatability) -> list[dict[str, Any]]:
    """For each query, how many of its k names the lists of two halves of the measurements share."""
    return [{"k": found.k, "shared": round(found.k * float(share), 2)} for share in found.by_query]


def check_given(given: Mapping[str, Told], answered: Mapping[str, Any], queries: int) -> None:
    """Raise ValueError unless what was measured is about the page's estimators and queries."""
    for name, found in given.items():
        if name not in answered:
            raise ValueError(f"repeatability= is about {name!r}, but the answers are of {', '.join(answered)}.")
        if isinstance(found, Repeatability) and len(found.by_query) != queries:
            raise ValueError(
                f"repeatability= of {name} was measured with {len(found.by_query)} queries, but the page has "
                f"{queries}; measure it with the page's own: rs.repeatability(store_or_index, queries)."
            )


def _sentence(found: Repeatability, samples: int | None) -> str:
    k, share = found.k, found.overlap
    parts = [
        f"measured again, {k * share.value:.1f} of the {k} names would come again "
        f"({k * share.low:.1f} to {k * share.high:.1f})"
    ]
    if share.value < LUCK:
        parts.append("the others are luck")
    if samples is not None and k > BY_CHANCE * samples:
        parts.append(f"chance alone, among {samples} samples, would bring {k * min(1, k / samples):.1f}")
    return "; ".join(parts) + "."


def _ends(interval: Interval) -> list[float]:
    return [round(float(x), 4) for x in (interval.value, interval.low, interval.high)]
