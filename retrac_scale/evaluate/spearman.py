"""Spearman's correlation of many pairs of columns at once, and without some of their rows, without sorting anew."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from retrac_scale.arrays import Float64


@dataclass(frozen=True, eq=False)
class Columns:
    """Columns `[m, q]`, sorted once, whose ranks within any resample of rows are sums of how often rows were drawn.

    Attributes:
        order: rows of each column by rising value, `[m, q]`.
        place: where each row stands in that order.
        begin: the first place of the rows with the same value, by row.
        end: the place behind their last.
    """

    order: Any
    place: Any
    begin: Any
    end: Any

    @classmethod
    def of(cls, values: Float64) -> Columns:
        """Sort `[m, q]`."""
        m, _ = values.shape
        order = np.argsort(values, axis=0, kind="stable")
        rising = np.take_along_axis(values, order, axis=0)
        new = np.concatenate([np.ones((1, values.shape[1]), bool), rising[1:] != rising[:-1]])
        places = np.arange(m)[:, None]
        begin = np.maximum.accumulate(np.where(new, places, 0), axis=0)
        last = np.concatenate([new[1:], np.ones((1, values.shape[1]), bool)])
        end = np.minimum.accumulate(np.where(last, places + 1, m)[::-1], axis=0)[::-1]
        place = np.argsort(order, axis=0, kind="stable")
        return cls(order, place, *(np.take_along_axis(at, place, axis=0) for at in (begin, end)))

    def ranks(self, counts: Any) -> Float64:
        """Of each row among rows drawn so often, ties at the mean of theirs, minus the mean of all ranks, `[m, q]`."""
        below = np.concatenate([np.zeros((1, self.order.shape[1])), np.cumsum(counts[self.order], axis=0)])
        at = (np.take_along_axis(below, ends, axis=0) for ends in (self.begin, self.end))
        ranks: Float64 = sum(at) / 2 - counts.sum() / 2
        return ranks


def correlation(a: Columns, b: Columns, counts: Any = None) -> Float64:
    """Spearman's correlation of columns along their rows, `[q]`, ties at their mean rank; NaN where all are tied.

    Args:
        a: `[m, q]`.
        b: `[m, q]`.
        counts: how often each row was drawn, `[m]`; default once.
    """
    drawn = np.ones(len(a.order)) if counts is None else np.asarray(counts, dtype=np.float64)
    x, y = a.ranks(drawn), b.ranks(drawn)
    with np.errstate(invalid="ignore"):
        found: Float64 = (drawn @ (x * y)) / np.sqrt((drawn @ (x * x)) * (drawn @ (y * y)))
    return found


def pseudo_values(a: Columns, b: Columns) -> Float64:
    """What each row adds to each column's correlation, `[m, q]`, by leaving it out: m r - (m - 1) r without it.

    NaN where all are tied. Their mean over rows is the jackknife's estimate of the correlation (Quenouille 1956), and
    they vary from row to row as if each were a value of its own (Tukey 1958).
    """
    m = len(a.order)
    without = np.stack([correlation(a, b, np.arange(m) != row) for row in range(m)])
    found: Float64 = m * correlation(a, b) - (m - 1) * without
    return found
