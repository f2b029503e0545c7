"""Products of int8 rows with queries of some seven bits, by instructions of every CPU with AVX2.

One instruction multiplies 32 bytes without a sign by 32 with one and adds up pairs, in 16 bits, which saturate. Rows go
without their sign, 128 more than they are. Queries are so small that two such instructions add up in 16 bits whatever
the rows are, and only then become 32 bits: three multiplications for 64 products, where `products` takes four.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from retrac_scale.arrays import Float64
from retrac_scale.native.compiled import compiled, fetch, has
from retrac_scale.native.int8 import FOUR, add_rest, in_registers

AVAILABLE = has("avx2")
"""Whether compiled code may use these instructions here."""

LANES, AT_ONCE, REGISTER = 8, 16, 32
"""Queries in a register, entries of each from one step to the next, and a register's bytes."""

HEIGHT, WIDTH = 4, 2
"""Rows and registers of queries whose sums, with what is multiplied, fill sixteen registers."""

BLOCK = 24
"""Rows that stay in a core's caches for all queries: a multiple of HEIGHT."""

SHIFT = 128
"""What makes an int8 entry of a row one without a sign."""

MOST = (2**15 - 1) // (2 * SHIFT - 1)
"""What positive entries of a query that meet in 16 bits may add up to, and negative ones."""

MEET = 4
"""Entries of a query that meet in 16 bits: each may be rounded up."""

WIDEST = 2**17
"""Entries of rows whose products with such queries add up in an int32."""


def meeting(queries: Float64) -> Float64:
    """The most that entries of one sign add up to where they meet in 16 bits, `[q]`, of queries `[q, k]`."""
    q, k = queries.shape
    whole = np.zeros((q, -(-k // (2 * FOUR)) * 2 * FOUR))
    whole[:, :k] = queries
    together = whole.reshape(q, -1, 2, FOUR // 2, 2)  # of two fours, the first halves and the second ones
    above, below = (np.maximum(sign * together, 0).sum((2, 4)).max((1, 2)) for sign in (1, -1))
    most: Float64 = np.maximum(above, below)
    return most


def packed(queries: npt.NDArray[np.int8]) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.int8], npt.NDArray[np.int32]]:
    """Queries `[q, k]` as the pass below reads them, `[registers, k // 16 * 4, 8, 4]`, the last entries, and sums."""
    q, k = queries.shape
    registers, entries = -(-q // LANES), k // AT_ONCE * AT_ONCE
    whole = np.zeros((registers * LANES, entries), np.int8)
    whole[:q] = queries[:, :entries]
    return in_registers(whole, LANES), np.ascontiguousarray(queries[:, entries:]), whole.sum(1, dtype=np.int32)


@intrinsic(prefer_literal=True)  # type: ignore[untyped-decorator]
def _multiply_tile(
    typing: Any, width: Any, rows: Any, step: Any, queries: Any, steps: Any, following: Any, out: Any
) -> Any:
    """Products of HEIGHT rows without a sign with `width` registers of queries, into `out` `[HEIGHT, width, LANES]`.

    Meanwhile as many bytes as the rows have are fetched from `following`. All but the width are addresses and numbers
    of bytes; products are int32.
    """
    registers = width.literal_value

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        _, rows, step, queries, steps, following, out = arguments
        int64, number = ir.IntType(64), ir.IntType(32)
        vector, halves, bytes_ = (ir.VectorType(ir.IntType(bits), REGISTER * 8 // bits) for bits in (32, 16, 8))
        none, nothing = ir.Constant(vector, ir.Undefined), ir.Constant(vector, [0] * LANES)
        ones = ir.Constant(halves, [1] * (REGISTER // 2))
        starts = [builder.add(rows, builder.mul(step, int64(row))) for row in range(HEIGHT)]
        panel = builder.mul(steps, int64(AT_ONCE * LANES))
        sides = [builder.add(queries, builder.mul(panel, int64(side))) for side in range(registers)]
        sums = [[cgutils.alloca_once_value(builder, nothing) for _ in sides] for _ in starts]

        def function(name: str, kind: Any, *given: Any) -> Any:
            return cgutils.get_or_insert_function(builder.module, ir.FunctionType(kind, given), f"llvm.x86.avx2.{name}")

        multiply_bytes = function("pmadd.ub.sw", halves, bytes_, bytes_)
        multiply_halves = function("pmadd.wd", vector, halves, halves)

        def read(base: Any, offset: Any, kind: Any) -> Any:
            return builder.load(builder.inttoptr(builder.add(base, offset), kind.as_pointer()), align=1)

        def everywhere(start: Any, entry: Any) -> Any:
            alone = builder.insert_element(none, read(start, entry, number), number(0))
            return builder.bitcast(builder.shuffle_vector(alone, none, nothing), bytes_)

        with cgutils.for_range(builder, steps) as loop:
            entry = builder.mul(loop.index, int64(AT_ONCE))
            fetch(builder, builder.add(following, builder.mul(entry, int64(HEIGHT))))
            for pair in range(0, AT_ONCE, 2 * FOUR):
                places = [builder.add(entry, int64(pair + four)) for four in (0, FOUR)]
                factors = [[read(side, builder.mul(at, int64(LANES)), bytes_) for at in places] for side in sides]
                for start, row in zip(starts, sums, strict=True):
                    entries = [everywhere(start, place) for place in places]
                    for those, register in zip(factors, row, strict=True):
                        both = [builder.call(multiply_bytes, pair) for pair in zip(entries, those, strict=True)]
                        found = builder.call(multiply_halves, [builder.add(*both), ones])
                        builder.store(builder.add(builder.load(register), found), register)
        for place, register in enumerate(register for row in sums for register in row):
            address = builder.inttoptr(builder.add(out, int64(REGISTER * place)), vector.as_pointer())
            builder.store(builder.load(register), address, align=4)
        return context.get_dummy_value()

    return types.void(width, *[types.intp] * 6), generate


@compiled
def multiply_paired(rows: Any, queries: Any, rest: Any, sums: Any, scale: Any, unit: Any, out: Any) -> None:
    """scale[n] unit[q] <rows[n], queries[q]> of int8 rows `[n, k]` and queries `[q, k]`, into float32 `[n, q]`.

    All arrays are contiguous, rows have at most WIDEST entries, and `meeting` of the queries is at most MOST.

    Args:
        rows: int8 `[n, k]`.
        queries: the first of `packed`.
        rest: the second.
        sums: the third.
        scale: float32 `[n]`.
        unit: float32 `[q]`.
        out: float32 `[n, q]`.
    """
    n, k = rows.shape
    q, rests = rest.shape
    entries = k - rests
    without_sign, products = np.zeros((BLOCK, entries), np.uint8), np.empty(HEIGHT * WIDTH * LANES, np.int32)
    into = products.ctypes.data
    for block in range(0, n, BLOCK):
        stop = min(block + BLOCK, n)
        for row in range(block, stop):
            given, copied = rows[row], without_sign[row - block]
            for place in range(entries):
                copied[place] = np.uint8(given[place]) ^ np.uint8(SHIFT)
        for register in range(0, len(queries), WIDTH):
            width, first = min(WIDTH, len(queries) - register) * LANES, register * LANES
            panel, count = queries.ctypes.data + first * entries, min(width, q - first)
            units, shifts = unit[first : first + count], sums[first : first + count]
            for top in range(block, stop, HEIGHT):
                here = without_sign.ctypes.data + (top - block) * entries
                following = rows.ctypes.data + (top + BLOCK) * k
                if width == WIDTH * LANES:
                    _multiply_tile(WIDTH, here, entries, panel, entries // AT_ONCE, following, into)
                else:
                    _multiply_tile(1, here, entries, panel, entries // AT_ONCE, following, into)
                for row in range(top, min(top + HEIGHT, stop)):
                    found, factor, target = products[(row - top) * width :], scale[row], out[row, first : first + count]
                    for query in range(count):
                        total = np.int32(found[query] - np.int32(SHIFT) * shifts[query])
                        target[query] = np.float32(total) * units[query] * factor
    add_rest(rows, rest, scale, unit, out)
