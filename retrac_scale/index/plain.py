"""What a scan computes, by NumPy alone: for scans that are done before torch and compiled passes would be loaded."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from retrac_scale.arrays import Bools, Float32, Float64, Int64

Multiply = Callable[[npt.NDArray[Any], Int64, Float64, Int64, Float64], None]
"""See `multiply`."""
Passing = Callable[[Float32, Float32, int, Bools | None], Int64]
"""See `passing`."""
Bounded = Callable[[Int64, Float32, Float64, Float32, Float64, Float64], tuple[Int64, Int64, Float64, Float64]]
"""See `bounded`."""

ROUNDING = 2.0**-24
SUMS = 64
"""Sums of exact products that run side by side, so that they are the same here and compiled."""
LIGHT_ENTRIES = 2**28
"""Entries of rows that NumPy goes through in a fraction of the seconds that torch and numba take to load."""
FREE_QUERIES = 16
"""Whose products take no longer than bringing the rows to float32."""
TILE = 512


class Light:
    """How many entries a process may still go through in plain NumPy."""

    def __init__(self, entries: int) -> None:
        self._left, self._lock = entries, threading.Lock()

    def take(self, entries: int, queries: int) -> bool:
        """Whether a scan of so many entries is light; never once torch is there."""
        work = entries * -(-queries // FREE_QUERIES)
        with self._lock:
            if "torch" in sys.modules or work > self._left:
                return False
            self._left -= work
            return True


light = Light(LIGHT_ENTRIES)


class Product(Protocol):
    """One checkpoint's queries, ready for a fast product: |<r,q> - approximation| <= error[q] |r|.

    Attributes:
        error: `[q]`.
        tile: rows that it best takes at a time.
    """

    error: Float64
    tile: int

    def weighted(self, rows: npt.NDArray[Any], scale: Float32) -> Float32:
        """scale[n] <rows[n], queries[q]>, roughly, `[n, q]`, in a buffer that the next call may overwrite."""


class Reached(Protocol):
    """See `Largest`."""

    def take(self, lanes: Int64, values: Float64, floor: Float64) -> None:
        """See `Largest`."""


class Largest:
    """What a scan's lanes have reached, for floors that k values of a lane reach.

    Args:
        lanes: how many.
        k: of each.
    """

    def __init__(self, lanes: int, k: int) -> None:
        self._count, self._k = lanes, k
        self._lanes, self._values = np.empty(0, np.int64), np.empty(0)

    def take(self, lanes: Int64, values: Float64, floor: Float64) -> None:
        """Take in values `[s]` of some lanes `[s]`, each of another sample; the floor `[lane]` may rise."""
        self._lanes, self._values = np.append(self._lanes, lanes), np.append(self._values, values)
        if len(self._values) >= 2 * self._k * self._count:
            np.maximum(floor, kth_largest(self._lanes, self._values, self._count, self._k), out=floor)
            kept = self._values >= floor[self._lanes]
            self._lanes, self._values = self._lanes[kept], self._values[kept]


class Arithmetic(Protocol):
    """What a scan computes by: this module, or `approximate`."""

    @property
    def Largest(self) -> Callable[[int, int], Reached]:
        """The class."""

    def product_of(self, queries: Float64, norm: Float64, dtype: np.dtype[Any], checkpoints: int) -> Product:
        """The fastest there is for queries `[q, k]` and rows of a dtype."""

    @property
    def multiply(self) -> Multiply:
        """The function."""

    @property
    def passing(self) -> Passing:
        """The function."""

    @property
    def bounded(self) -> Bounded:
        """The function."""


class PlainProduct:
    """As `Product`, in float32 by NumPy."""

    def __init__(self, queries: Float64, norm: Float64, checkpoints: int) -> None:
        self._matrix = queries.T.astype(np.float32)
        self.error = rounding(norm, checkpoints) + summation(norm, queries.shape[1])
        self.tile = TILE

    def weighted(self, rows: npt.NDArray[Any], scale: Float32) -> Float32:
        """scale[n] <rows[n], queries[q]>, roughly, `[n, q]`."""
        weighted: Float32 = rows.astype(np.float32, copy=False) @ self._matrix
        weighted *= scale[:, None]
        return weighted


def product_of(queries: Float64, norm: Float64, dtype: np.dtype[Any], checkpoints: int) -> Product:
    """A product of queries `[q, k]` of some norms with rows of any dtype."""
    return PlainProduct(queries, norm, checkpoints)


def rounding(norm: Float64, checkpoints: int) -> Float64:
    """What the steps before and after a product of queries of some norms may lose, `[q]`."""
    return (8 + checkpoints) * ROUNDING * norm


def summation(norm: Float64, entries: int) -> Float64:
    """What a float32 sum of so many products may lose, `[q]`."""
    return 1.1 * entries * ROUNDING * norm


def multiply(rows: npt.NDArray[Any], places: Int64, queries: Float64, asked: Int64, out: Float64) -> None:
    """<rows[places], queries[asked]> in float64, `[s]`, each a sum in an order that its length alone decides."""
    sums = np.zeros((len(places), SUMS))
    for start in range(0, rows.shape[1], SUMS):
        part = slice(start, start + SUMS)
        products = rows[places, part].astype(np.float64) * queries[asked, part]
        sums[:, : products.shape[1]] += products
    while sums.shape[1] > 1:
        half = sums.shape[1] // 2
        sums = sums[:, :half] + sums[:, half:]
    out[:] = sums[:, 0]


def passing(values: Float32, lowest: Float32, sign: int, counting: Bools | None) -> Int64:
    """Where values `[n, q]` of a sign reach the lowest `[q]` that counts, as places in the flattened values.

    Args:
        counting: which of them count at all, `[n, q]` or `[n, 1]`; None for all.
    """
    reached = np.greater_equal(values, lowest) if sign > 0 else np.less_equal(values, -lowest)
    if counting is not None:
        reached &= counting
    return np.flatnonzero(reached)


def bounded(
    places: Int64, values: Float32, unit: Float64, norm: Float32, error: Float64, faint: Float64
) -> tuple[Int64, Int64, Float64, Float64]:
    """Rows and queries of some places in flattened values `[n, q]`, the values times their units, and their bounds.

    Args:
        places: `[s]`.
        values: of products.
        unit: with a sign, `[q]`.
        norm: of each checkpoint's rows, `[c, n]`.
        error: of its products, for each of these, `[c, q]`.
        faint: that of all of them beside it, `[q]`.

    Returns:
        `[s]` each.
    """
    rows, queries = np.divmod(places, values.shape[1])
    bound = np.einsum("cs,cs->s", norm[:, rows].astype(np.float64), error[:, queries]) + faint[queries]
    return rows, queries, values.ravel()[places].astype(np.float64) * unit[queries], bound


def kth_largest(lanes: Int64, values: Float64, count: int, k: int) -> Float64:
    """The k-th largest of the values `[s]` of each of so many lanes `[s]`, -inf where there are fewer."""
    order = np.argsort(values)
    order = order[stable_order(lanes[order], count)]
    counts = np.bincount(lanes, minlength=count)
    full = counts >= k
    kth = np.full(count, -np.inf)
    kth[full] = values[order[np.cumsum(counts)[full] - k]]
    return kth


def stable_order(numbers: Int64, count: int) -> Int64:
    """The stable order of integers below a count; a few bits of each are sorted in linear time."""
    return np.argsort(numbers.astype(np.min_scalar_type(count)), kind="stable")
