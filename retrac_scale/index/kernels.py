"""Compiled passes of a scan, over the rows that are stored."""

from __future__ import annotations

from typing import Any

import numpy as np

from retrac_scale.index.plain import SUMS
from retrac_scale.native.compiled import AHEAD, LINE, STRETCH, compiled, prefetch


@compiled
def dot(rows: Any, query: Any, scale: Any, unit: Any, out: Any) -> None:
    """scale[n] unit <rows[n], query> of int8 rows `[n, k]`, as fast as memory gives them.

    Four places are read at once, and prefetched: with one, a core has too few lines on the way.
    """
    n, k = rows.shape
    apart, beyond = n // 4, rows.ctypes.data + AHEAD
    for row in range(apart):
        first, second, third, fourth = np.int32(0), np.int32(0), np.int32(0), np.int32(0)
        for start in range(0, k, STRETCH):
            stop = min(start + STRETCH, k)
            for place in range(start, stop, LINE):
                for number in range(4):
                    prefetch(beyond + (row + number * apart) * k + place)
            a, b = rows[row, start:stop], rows[row + apart, start:stop]
            c, d = rows[row + 2 * apart, start:stop], rows[row + 3 * apart, start:stop]
            factors = query[start:stop]
            for place in range(len(factors)):
                factor = np.int32(factors[place])
                first = np.int32(first + np.int32(a[place]) * factor)
                second = np.int32(second + np.int32(b[place]) * factor)
                third = np.int32(third + np.int32(c[place]) * factor)
                fourth = np.int32(fourth + np.int32(d[place]) * factor)
        for number, total in enumerate((first, second, third, fourth)):
            out[row + number * apart] = np.float32(total) * unit * scale[row + number * apart]
    for row in range(4 * apart, n):
        total = np.int32(0)
        for place in range(k):
            total = np.int32(total + np.int32(rows[row, place]) * np.int32(query[place]))
        out[row] = np.float32(total) * unit * scale[row]


@compiled
def passing(values: Any, lowest: Any, sign: Any, counting: Any, places: Any) -> int:
    """As `plain.passing`, with `counting` of every value; into `places`, of which so many are written."""
    n, q = values.shape
    found = 0
    for row in range(n):
        for start in range(0, q, SUMS):
            stop = min(start + SUMS, q)
            some, least, reached = values[row, start:stop], lowest[start:stop], np.int32(0)
            for lane in range(len(some)):
                reached |= np.int32(sign * some[lane] >= least[lane])
            if reached:  # which is rare
                for lane in range(len(some)):
                    if sign * some[lane] >= least[lane] and counting[row, start + lane]:
                        places[found] = row * q + start + lane
                        found += 1
    return found


@compiled
def multiply(rows: Any, places: Any, queries: Any, asked: Any, out: Any) -> None:
    """As `plain.multiply`, bit by bit; of float16 rows nothing is known here."""
    sums = np.empty(SUMS)
    for number in range(len(places)):
        row, query = rows[places[number]], queries[asked[number]]
        whole = len(row) - len(row) % SUMS
        sums[:] = 0
        for start in range(0, whole, SUMS):
            some, factors = row[start : start + SUMS], query[start : start + SUMS]
            for lane in range(SUMS):
                sums[lane] += np.float64(some[lane]) * factors[lane]
        for place in range(whole, len(row)):
            sums[place - whole] += np.float64(row[place]) * query[place]
        width = SUMS
        while width > 1:
            width //= 2
            for lane in range(width):
                sums[lane] += sums[lane + width]
        out[number] = sums[0]
