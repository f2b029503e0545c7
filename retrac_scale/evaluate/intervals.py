"""Intervals: how far a figure may be off by the choice of queries."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
import numpy.typing as npt

Statistic = Callable[..., float]


@dataclass(frozen=True)
class Interval:
    """A figure with the ends of its interval."""

    value: float
    low: float
    high: float

    def __format__(self, spec: str) -> str:
        return f"{self.value:{spec}} [{self.low:{spec}}, {self.high:{spec}}]"


def bootstrap(
    statistic: Statistic, *arrays: npt.ArrayLike, draws: int = 1000, level: float = 0.95, seed: int = 0
) -> Interval:
    """Percentile bootstrap: the statistic over resamples, with replacement, of the rows of all arrays together.

    Right for means, correlations, shares and their ratios (pass both methods' values, so that they are resampled
    together). Wrong for `unique_fraction`, since a query drawn twice agrees with itself: use `jackknife` for that.

    Args:
        statistic: called with the arrays, each a resample of its rows.
        arrays: `[q, ...]` each, one row per query (or sample).
        draws: how many resamples.
        level: of the interval.
        seed: of the resamples.

    Raises:
        ValueError: the arrays differ in their number of rows.
    """
    rows = _rows(arrays)
    rng = np.random.default_rng(seed)
    q = len(rows[0])
    values = []
    for _ in range(draws):
        places = rng.integers(0, q, q)
        values.append(statistic(*(array[places] for array in rows)))
    return percentiles(statistic(*rows), values, level)


def jackknife(statistic: Statistic, *arrays: npt.ArrayLike, level: float = 0.95) -> Interval:
    """The statistic plus and minus its jackknife standard error times the normal quantile.

    The standard error comes from the q values of the statistic with one row left out (Efron and Stein 1981).

    Args:
        statistic: called with the arrays, each without one row.
        arrays: `[q, ...]` each, one row per query.
        level: of the interval.

    Raises:
        ValueError: there are fewer than two rows, or the arrays differ in their number.
    """
    rows = _rows(arrays)
    q = len(rows[0])
    if q < 2:
        raise ValueError(f"the jackknife leaves out one of at least two rows, got {q}.")
    without = np.array([statistic(*(np.delete(array, row, 0) for array in rows)) for row in range(q)])
    error = float(np.sqrt((q - 1) * without.var()))
    value, reach = statistic(*rows), NormalDist().inv_cdf((1 + level) / 2) * error
    return Interval(float(value), float(value - reach), float(value + reach))


def two_way(value: float, table: npt.ArrayLike, level: float = 0.95) -> Interval:
    """A mean over rows and columns, both of which were drawn, plus and minus its standard error times the quantile.

    The variance of the mean is that by rows plus that by columns less that of what neither explains, which both hold:
    mean squares of the two-way layout with random effects (Scheffe 1959, chapter 7). Resampling rows and columns at
    once would count the last three times (Owen 2007).

    Args:
        value: the mean.
        table: `[m, q]`; of one column, the interval is of other rows alone.
        level: of the interval.
    """
    cells = np.asarray(table, dtype=np.float64)
    m, q = cells.shape
    rows, columns, mean = cells.mean(1, keepdims=True), cells.mean(0, keepdims=True), cells.mean()
    by_rows = q * np.square(rows - mean).sum() / (m - 1)
    by_columns = m * np.square(columns - mean).sum() / max(q - 1, 1)
    rest = np.square(cells - rows - columns + mean).sum() / ((m - 1) * max(q - 1, 1))
    error = np.sqrt(max(by_rows + by_columns - rest, rest) / (m * q))
    reach = NormalDist().inv_cdf((1 + level) / 2) * float(error)
    return Interval(float(value), float(value - reach), float(value + reach))


def _rows(arrays: Sequence[npt.ArrayLike]) -> list[npt.NDArray[Any]]:
    rows = [np.asarray(array) for array in arrays]
    if len({len(array) for array in rows}) > 1:
        raise ValueError(
            f"arrays whose rows belong together need as many rows, got {', '.join(str(len(array)) for array in rows)}."
        )
    return rows


def percentiles(value: float, resampled: Any, level: float = 0.95) -> Interval:
    """The interval that holds this share of the resampled values, as much left out below as above."""
    low, high = np.nanquantile(np.asarray(resampled, dtype=np.float64), [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(value), float(low), float(high))
