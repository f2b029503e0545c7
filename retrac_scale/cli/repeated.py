"""How far two runs would agree, as a verb tells it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from retrac_scale.measurement.halves import Repeatability
    from retrac_scale.query.index import Index
    from retrac_scale.store import SketchStore


def told(opened: Callable[[], SketchStore | Index], asked: bool) -> tuple[str, dict[str, Any]]:
    """A line and JSON data: the repeatability under the recommended estimator, or why it is not told.

    Args:
        opened: gives a complete store, or an index with matched pairing.
        asked: whether it is to be measured.
    """
    if not asked:
        why = "not measured; --repeatability does"
        return f"repeatability: {why}", {"unknown": why}
    from retrac_scale.measurement.repeatability import repeatability

    try:
        found = repeatability(opened())
    except ValueError as error:  # measured once, too few samples, or nothing to compare
        return f"repeatability: {error}", {"unknown": str(error)}
    return f"repeatability: {found}", as_json(found)


def as_json(found: Repeatability) -> dict[str, Any]:
    """Its figures with their intervals."""
    figures = ("halves", "overlap", "rank_correlation")
    return {"k": found.k, "measurements": found.measurements} | {key: asdict(getattr(found, key)) for key in figures}
