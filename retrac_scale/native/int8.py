"""Products of int8 rows with int8 queries by the instructions that CPUs have for them (AVX-512 VNNI).

One instruction multiplies four entries of a row with those of sixteen queries and adds up, at four times the rate of
float32. It takes its queries without a sign: they are 128 more than they are, which the row's sum takes back.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from retrac_scale.native.compiled import LINE, compiled, fetch, has

AVAILABLE = has("avx512vnni") and has("avx512bw")
"""Whether compiled code may use these instructions here."""

LANES, FOUR, AT_ONCE = 16, 4, 16
"""Queries in a register, and entries of each; entries from one step to the next."""

BLOCK = 24
"""Rows that stay in a core's caches for all queries: a multiple of how many are summed or multiplied at a time."""

SUMMED = 8
"""Rows that are summed side by side."""

TOGETHER, AHEAD = 4, 1536
"""Rows multiplied with a single query side by side, for from one alone too few cache lines are on the way; and bytes
from what is multiplied to what is fetched."""

SHIFT = 128
"""What makes an int8 query one without a sign."""


def packed(queries: npt.NDArray[np.int8]) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int8]]:
    """Queries `[q, k]` as the pass below reads them, `[registers, k // 16 * 4, 16, 4]`, and the last k % 16 entries."""
    q, k = queries.shape
    registers, entries = -(-q // LANES), k // AT_ONCE * AT_ONCE
    whole = np.full((registers * LANES, entries), SHIFT, np.uint8)
    whole[:q] = queries[:, :entries].view(np.uint8) ^ SHIFT
    return in_registers(whole, LANES), np.ascontiguousarray(queries[:, entries:])


def in_registers(whole: npt.NDArray[Any], lanes: int) -> npt.NDArray[Any]:
    """Bytes of queries `[registers * lanes, k]`, so many in a register, as `[registers, k // 4, lanes, 4]`."""
    registers, fours = len(whole) // lanes, whole.shape[1] // FOUR
    out = aligned(whole.size).view(whole.dtype).reshape(registers, fours, lanes, FOUR)
    out[:] = whole.reshape(registers, lanes, fours, FOUR).transpose(0, 2, 1, 3)
    return out


def aligned(nbytes: int) -> npt.NDArray[np.uint8]:
    """Memory that begins with a cache line."""
    room = np.empty(nbytes + LINE, np.uint8)
    start = -room.ctypes.data % LINE
    return room[start : start + nbytes]


def add_products_of_bytes(builder: Any, total: Any, unsigned: Any, signed: Any) -> Any:
    """Among the instructions of an intrinsic: sums `[16]` of int32, to each of which four products of bytes are added.

    Args:
        builder: LLVM's.
        total: the sums.
        unsigned: 64 bytes without a sign, as 16 numbers.
        signed: 64 bytes with one.
    """
    kind = ir.VectorType(ir.IntType(32), LANES)
    name = "llvm.x86.avx512.vpdpbusd.512"
    function = cgutils.get_or_insert_function(builder.module, ir.FunctionType(kind, [kind] * 3), name)
    return builder.call(function, [total, unsigned, signed])


def _starts(builder: Any, count: int, rows: Any, step: Any, last: Any) -> list[Any]:
    """Addresses of some rows, of which those after the last are the last once more."""
    starts = [ir.IntType(64)(0)]
    for _ in range(count - 1):
        following = builder.add(starts[-1], step)
        starts.append(builder.select(builder.icmp_signed("<", following, last), following, last))
    return [builder.add(rows, start) for start in starts]


def _store_totals(builder: Any, sums: list[Any], out: Any) -> None:
    """The total of each register of sums, int32, at an address."""
    number = ir.IntType(32)
    kind = ir.FunctionType(number, [ir.VectorType(number, LANES)])
    reduce = cgutils.get_or_insert_function(builder.module, kind, f"llvm.vector.reduce.add.v{LANES}i32")
    for place, register in enumerate(sums):
        address = builder.inttoptr(builder.add(out, ir.IntType(64)(4 * place)), number.as_pointer())
        builder.store(builder.call(reduce, [builder.load(register)]), address)


@intrinsic  # type: ignore[untyped-decorator]
def _sum_lines(typing: Any, rows: Any, step: Any, last: Any, lines: Any, out: Any) -> Any:
    """Sums of SUMMED rows over LINE entries for each line, int32, into `out`; addresses and steps in bytes."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        rows, step, last, lines, out = arguments
        int64, vector = ir.IntType(64), ir.VectorType(ir.IntType(32), LANES)
        ones = ir.Constant(vector, [0x01010101] * LANES)
        starts = _starts(builder, SUMMED, rows, step, last)
        sums = [cgutils.alloca_once_value(builder, ir.Constant(vector, [0] * LANES)) for _ in starts]
        with cgutils.for_range(builder, lines) as loop:
            offset = builder.mul(loop.index, int64(LINE))
            for start, register in zip(starts, sums, strict=True):
                entries = builder.load(builder.inttoptr(builder.add(start, offset), vector.as_pointer()), align=1)
                builder.store(add_products_of_bytes(builder, builder.load(register), ones, entries), register)
        _store_totals(builder, sums, out)
        return context.get_dummy_value()

    return types.void(*[types.intp] * 5), generate


@intrinsic(prefer_literal=True)  # type: ignore[untyped-decorator]
def _multiply_tile(
    typing: Any, height: Any, width: Any, rows: Any, step: Any, last: Any, queries: Any, steps: Any, out: Any
) -> Any:
    """Products of `height` rows with `width` registers of queries, int32 `[height, width, LANES]`, into `out`.

    Meanwhile what lies a block further in memory is fetched, as much as the rows are.
    """
    n, count = height.literal_value, width.literal_value

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        _, _, rows, step, last, queries, steps, out = arguments
        int64, number = ir.IntType(64), ir.IntType(32)
        vector = ir.VectorType(number, LANES)
        first, none = number(0), ir.Constant(vector, ir.Undefined)
        everywhere = ir.Constant(vector, [0] * LANES)
        starts = _starts(builder, n, rows, step, last)
        following = builder.add(rows, builder.mul(step, int64(BLOCK)))
        panel = builder.mul(steps, int64(AT_ONCE * LANES))
        sides = [builder.add(queries, builder.mul(panel, int64(side))) for side in range(count)]
        sums = [[cgutils.alloca_once_value(builder, everywhere) for _ in sides] for _ in starts]

        def read(base: Any, offset: Any, kind: Any) -> Any:
            return builder.load(builder.inttoptr(builder.add(base, offset), kind.as_pointer()), align=1)

        with cgutils.for_range(builder, steps) as loop:
            entry = builder.mul(loop.index, int64(AT_ONCE))
            ahead = builder.add(following, builder.mul(entry, int64(n)))
            for line in range(0, n * AT_ONCE, LINE):
                fetch(builder, builder.add(ahead, int64(line)))
            for four in range(0, AT_ONCE, FOUR):
                here = builder.add(entry, int64(four))
                factors = [read(side, builder.mul(here, int64(LANES)), vector) for side in sides]
                for start, registers in zip(starts, sums, strict=True):
                    bits = builder.insert_element(none, read(start, here, number), first)
                    entries = builder.shuffle_vector(bits, none, everywhere)
                    for factor, register in zip(factors, registers, strict=True):
                        builder.store(add_products_of_bytes(builder, builder.load(register), factor, entries), register)
        for row, registers in enumerate(sums):
            for side, register in enumerate(registers):
                place = builder.add(out, int64(LINE * (row * count + side)))
                builder.store(builder.load(register), builder.inttoptr(place, vector.as_pointer()), align=4)
        return context.get_dummy_value()

    return types.void(height, width, *[types.intp] * 6), generate


@compiled
def _sum_rows(rows: Any, first: Any, stop: Any, entries: Any, out: Any) -> None:
    """Sums of some rows' first entries, int32."""
    n, k = rows.shape
    lines = entries // LINE
    for row in range(first, stop, SUMMED):
        into = out.ctypes.data + 4 * (row - first)
        _sum_lines(rows.ctypes.data + row * k, k, (n - 1 - row) * k, lines, into)
    for row in range(first, stop):
        for place in range(lines * LINE, entries):
            out[row - first] += np.int32(rows[row, place])


@compiled
def add_rest(rows: Any, rest: Any, scale: Any, unit: Any, out: Any) -> None:
    """Products of what is no whole step."""
    n, k = rows.shape
    q, count = rest.shape
    for row in range(n if count else 0):
        for query in range(q):
            total = np.int32(0)
            for place in range(count):
                total = np.int32(total + np.int32(rows[row, k - count + place]) * np.int32(rest[query, place]))
            out[row, query] += np.float32(total) * unit[query] * scale[row]


@intrinsic  # type: ignore[untyped-decorator]
def _sum_products(typing: Any, rows: Any, apart: Any, query: Any, lines: Any, out: Any) -> Any:
    """Products of TOGETHER rows, so many bytes apart, with one query, over LINE entries for each line, into `out`.

    Here rows lose their sign, so that what is to be taken back is the same for all: SHIFT times the query's sum.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        rows, apart, query, lines, out = arguments
        int64, vector = ir.IntType(64), ir.VectorType(ir.IntType(32), LANES)
        without_sign = ir.Constant(vector, [0x80808080] * LANES)
        starts = [builder.add(rows, builder.mul(apart, int64(row))) for row in range(TOGETHER)]
        sums = [cgutils.alloca_once_value(builder, ir.Constant(vector, [0] * LANES)) for _ in starts]

        def read(base: Any, offset: Any) -> Any:
            return builder.load(builder.inttoptr(builder.add(base, offset), vector.as_pointer()), align=1)

        with cgutils.for_range(builder, lines) as loop:
            place = builder.mul(loop.index, int64(LINE))
            factors = read(query, place)
            for start, register in zip(starts, sums, strict=True):
                fetch(builder, builder.add(builder.add(start, place), int64(AHEAD)))
                entries = builder.xor(read(start, place), without_sign)
                builder.store(add_products_of_bytes(builder, builder.load(register), entries, factors), register)
        _store_totals(builder, sums, out)
        return context.get_dummy_value()

    return types.void(*[types.intp] * 5), generate


@compiled
def multiply_one(rows: Any, query: Any, scale: Any, unit: Any, out: Any) -> None:
    """scale[n] unit <rows[n], query> of int8 rows `[n, k]` and one int8 query `[k]`, into float32 `[n]`.

    As fast as memory gives the rows: TOGETHER places are read at once, and fetched ahead; arguments are contiguous.
    """
    n, k = rows.shape
    lines, apart = k // LINE, n // TOGETHER
    sums, shift = np.empty(TOGETHER, np.int32), np.int32(0)
    for place in range(lines * LINE):
        shift += np.int32(query[place])
    shift *= np.int32(SHIFT)
    for row in range(apart):
        _sum_products(rows.ctypes.data + row * k, apart * k, query.ctypes.data, lines, sums.ctypes.data)
        for number in range(TOGETHER):
            one = row + number * apart
            total = np.int32(sums[number] - shift)
            for place in range(lines * LINE, k):
                total = np.int32(total + np.int32(rows[one, place]) * np.int32(query[place]))
            out[one] = np.float32(total) * unit * scale[one]
    for one in range(TOGETHER * apart, n):
        total = np.int32(0)
        for place in range(k):
            total = np.int32(total + np.int32(rows[one, place]) * np.int32(query[place]))
        out[one] = np.float32(total) * unit * scale[one]


@compiled
def multiply_several(rows: Any, queries: Any, rest: Any, scale: Any, unit: Any, out: Any) -> None:
    """scale[n] unit[q] <rows[n], queries[q]> of int8 rows `[n, k]` and queries `[q, k]`, into float32 `[n, q]`.

    All arrays are contiguous, and no sum of products may exceed an int32.

    Args:
        rows: int8 `[n, k]`.
        queries: the first of `packed`.
        rest: the second.
        scale: float32 `[n]`.
        unit: float32 `[q]`.
        out: float32 `[n, q]`.
    """
    n, k = rows.shape
    q, steps = len(rest), k // AT_ONCE
    sums, products = np.empty(BLOCK, np.int32), np.empty(BLOCK * LANES, np.int32)
    into = products.ctypes.data
    for block in range(0, n, BLOCK):
        stop, register = min(block + BLOCK, n), 0
        _sum_rows(rows, block, stop, steps * AT_ONCE, sums)
        while register < len(queries):
            panel, first = queries.ctypes.data + register * steps * AT_ONCE * LANES, register * LANES
            width = 4 if register + 4 <= len(queries) else 2 if register + 2 <= len(queries) else 1
            height, count = 6 if width == 4 else 8, min(width * LANES, q - first)
            units = unit[first : first + count]
            for top in range(block, stop, height):
                here, last = rows.ctypes.data + top * k, (n - 1 - top) * k
                if width == 4:  # the tile's sums and factors fill the registers
                    _multiply_tile(6, 4, here, k, last, panel, steps, into)
                elif width == 2:
                    _multiply_tile(8, 2, here, k, last, panel, steps, into)
                else:
                    _multiply_tile(8, 1, here, k, last, panel, steps, into)
                for row in range(top, min(top + height, stop)):
                    place, shift, factor = (row - top) * width * LANES, SHIFT * sums[row - block], scale[row]
                    found, target = products[place : place + count], out[row, first : first + count]
                    for query in range(count):
                        target[query] = np.float32(np.int32(found[query] - shift)) * units[query] * factor
            register += width
    add_rest(rows, rest, scale, unit, out)
