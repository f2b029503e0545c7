"""Compiled passes of a scan, over the rows that are stored."""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

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


@intrinsic  # type: ignore[untyped-decorator]
def _reaching(typing: Any, values: Any, lowest: Any, sign: Any) -> Any:
    """Of SUMS float32 at an address, those that times a sign reach what stands at another: a bit each."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        vector, number = ir.VectorType(ir.FloatType(), SUMS), ir.IntType(32)
        some, least = (builder.load(builder.inttoptr(each, vector.as_pointer()), align=4) for each in arguments[:2])
        alone = builder.insert_element(ir.Constant(vector, ir.Undefined), arguments[2], number(0))
        signs = builder.shuffle_vector(alone, alone, ir.Constant(ir.VectorType(number, SUMS), [0] * SUMS))
        return builder.bitcast(builder.fcmp_ordered(">=", builder.fmul(some, signs), least), ir.IntType(SUMS))

    return types.uint64(types.intp, types.intp, types.float32), generate


@intrinsic  # type: ignore[untyped-decorator]
def _first(typing: Any, bits: Any) -> Any:
    """The number of the first bit that is set."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.cttz(arguments[0], ir.IntType(1)(1))

    return types.int64(types.uint64), generate


@compiled
def passing(values: Any, lowest: Any, sign: Any, counting: Any, places: Any) -> int:
    """As `plain.passing`, with flat values; into `places`, of which so many are written.

    Args:
        values: `[n q]`.
        lowest: `[q + SUMS]`, again from the first on after the last.
        sign: 1 or -1, float32.
        counting: of every value, `[n, q]`.
        places: int64 `[n q]`.
    """
    q = counting.shape[1]
    found, lane, whole = 0, 0, len(values) - len(values) % SUMS
    for start in range(0, whole, SUMS):
        bits = _reaching(values.ctypes.data + 4 * start, lowest.ctypes.data + 4 * lane, sign)
        while bits:  # which is rare
            place = start + _first(bits)
            bits &= bits - np.uint64(1)
            if counting[place // q, place % q]:
                places[found] = place
                found += 1
        lane = (lane + SUMS) % q
    for place in range(whole, len(values)):
        if sign * values[place] >= lowest[place % q] and counting[place // q, place % q]:
            places[found] = place
            found += 1
    return found


@compiled
def bounded(
    places: Any,
    values: Any,
    unit: Any,
    norm: Any,
    error: Any,
    faint: Any,
    rows: Any,
    queries: Any,
    found: Any,
    bound: Any,
) -> None:
    """As `plain.bounded`, of flat values; into the last four, `[s]` each."""
    q = len(unit)
    for number in range(len(places)):
        row = places[number] // q
        query = places[number] - row * q
        total = 0.0
        for c in range(len(norm)):
            total += np.float64(norm[c, row]) * error[c, query]
        rows[number], queries[number] = row, query
        found[number], bound[number] = np.float64(values[places[number]]) * unit[query], total + faint[query]


@compiled
def keep_largest(largest: Any, lanes: Any, values: Any, floor: Any) -> None:
    """Take in values `[s]` of some lanes `[s]`, and raise the floor to what k values of a lane reach.

    Args:
        largest: those of each lane as a heap, the least of them first, `[lane, k]`; -inf where there are fewer.
        lanes: those of the new values.
        values: float64.
        floor: `[lane]`.
    """
    k = largest.shape[1]
    for number in range(len(lanes)):
        lane, value = lanes[number], values[number]
        if value > floor[lane] and value > largest[lane, 0]:
            own, place, child = largest[lane], 0, 1
            while child < k:
                if child + 1 < k and own[child + 1] < own[child]:
                    child += 1
                if own[child] >= value:
                    break
                own[place] = own[child]
                place, child = child, 2 * child + 1
            own[place] = value
            floor[lane] = max(floor[lane], own[0])


@intrinsic  # type: ignore[untyped-decorator]
def _add_up(typing: Any, rows: Any, row: Any, query: Any, stretches: Any, sums: Any) -> Any:
    """SUMS sums of a row's products with a float64 query, over so many stretches of SUMS, into `sums`; addresses.

    Args:
        typing: numba's.
        rows: int8 or float, for their type.
        row: address.
        query: address.
        stretches: how many.
        sums: address of float64.
    """
    of_integers = isinstance(rows.dtype, types.Integer)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        _, row, query, stretches, out = arguments
        int64, vector = ir.IntType(64), ir.VectorType(ir.DoubleType(), SUMS)
        stored = ir.VectorType(context.get_value_type(rows.dtype), SUMS)
        widen = builder.sitofp if of_integers else builder.fpext
        sums = cgutils.alloca_once_value(builder, ir.Constant(vector, [0.0] * SUMS))

        def read(base: Any, stretch: Any, kind: Any, width: int) -> Any:
            address = builder.add(base, builder.mul(stretch, int64(SUMS * width)))
            return builder.load(builder.inttoptr(address, kind.as_pointer()), align=1)

        with cgutils.for_range(builder, stretches) as loop:
            entries = widen(read(row, loop.index, stored, rows.dtype.bitwidth // 8), vector)
            products = builder.fmul(entries, read(query, loop.index, vector, 8))
            builder.store(builder.fadd(builder.load(sums), products), sums)
        builder.store(builder.load(sums), builder.inttoptr(out, vector.as_pointer()), align=8)
        return context.get_dummy_value()

    return types.void(rows, *[types.intp] * 4), generate


@compiled
def multiply(rows: Any, places: Any, queries: Any, asked: Any, out: Any) -> None:
    """As `plain.multiply`, bit by bit, of contiguous int8 or float32 rows and queries; the next row is fetched."""
    sums, k = np.empty(SUMS), rows.shape[1]
    step, stretches = k * rows.itemsize, k // SUMS
    for number in range(len(places)):
        row, query = rows[places[number]], queries[asked[number]]
        following = rows.ctypes.data + places[min(number + 1, len(places) - 1)] * step
        for line in range(0, step, LINE):
            prefetch(following + line)
        _add_up(rows, row.ctypes.data, query.ctypes.data, stretches, sums.ctypes.data)
        for place in range(stretches * SUMS, k):
            sums[place - stretches * SUMS] += np.float64(row[place]) * query[place]
        width = SUMS
        while width > 1:
            width //= 2
            for lane in range(width):
                sums[lane] += sums[lane + width]
        out[number] = sums[0]
