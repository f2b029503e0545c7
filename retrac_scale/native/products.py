"""Products of int8 rows with int16 queries, summed in the registers of a CPU.

Two entries of a row and of a query are multiplied and added up by one instruction of every CPU with AVX2 or NEON, into
32 bits that do not saturate. Where there is nothing made for int8 alone, that is twice the rate of float32, and rows
need not be widened in memory.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from retrac_scale.native.compiled import LINE, compiled, fetch, has

LANES = 16 if has("avx512bw") else 8 if has("avx2") else 4
"""Sums of 32 bits in a vector register."""

QUERIES = 4
"""Multiplied with two rows at a time: their eight sums, and what is multiplied, fill sixteen registers."""

BLOCK = 64
"""Rows that stay in a core's caches for all queries."""

APART = 4
"""Rows from those that are multiplied to those that are fetched meanwhile, where two are read side by side."""


@intrinsic(prefer_literal=True)  # type: ignore[untyped-decorator]
def _sum_tile(
    typing: Any, rows: Any, queries: Any, left: Any, left_step: Any, right: Any, right_step: Any, lines: Any, out: Any
) -> Any:
    """Sums of products of `rows` with `queries` over LINE entries for each line, int32 into `out`; steps in bytes."""
    height, width = rows.literal_value, queries.literal_value

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        _, _, left, left_step, right, right_step, lines, out = arguments
        int64, number, place = ir.IntType(64), ir.IntType(32), ir.IntType(32)
        at_once = 2 * LANES
        bytes_, halves, wide = (ir.VectorType(ir.IntType(bits), at_once) for bits in (8, 16, 32))
        vector = ir.VectorType(number, LANES)
        even, odd = (ir.Constant(ir.VectorType(place, LANES), list(range(first, at_once, 2))) for first in range(2))
        kind = ir.FunctionType(number, [vector])
        reduce = cgutils.get_or_insert_function(builder.module, kind, f"llvm.vector.reduce.add.v{LANES}i32")

        def at(base: Any, offset: Any, kind: Any) -> Any:
            return builder.inttoptr(builder.add(base, offset), kind.as_pointer())

        def stepping(base: Any, by: Any, count: int) -> list[Any]:
            return [builder.add(base, builder.mul(by, int64(row))) for row in range(count)]

        lefts, rights = stepping(left, left_step, height), stepping(right, right_step, width)
        sums = [[cgutils.alloca_once(builder, vector) for _ in rights] for _ in lefts]
        for register in (register for registers in sums for register in registers):
            builder.store(ir.Constant(vector, [0] * LANES), register)
        with cgutils.for_range(builder, lines) as loop:
            for address in lefts if height > 1 else ():  # a row alone is read in order, which CPUs foresee
                later = builder.add(address, builder.mul(left_step, int64(APART)))
                fetch(builder, builder.add(later, builder.mul(loop.index, int64(LINE))))
            for start in range(0, LINE, at_once):
                entry = builder.add(builder.mul(loop.index, int64(LINE)), int64(start))
                factors = [builder.load(at(r, builder.mul(entry, int64(2)), halves), align=2) for r in rights]
                for address, registers in zip(lefts, sums, strict=True):
                    row = builder.sext(builder.load(at(address, entry, bytes_), align=1), halves)
                    for factor, register in zip(factors, registers, strict=True):
                        products = builder.mul(builder.sext(row, wide), builder.sext(factor, wide))
                        none = ir.Constant(wide, ir.Undefined)
                        pairs = [builder.shuffle_vector(products, none, those) for those in (even, odd)]
                        builder.store(builder.add(builder.load(register), builder.add(*pairs)), register)
        for row, registers in enumerate(sums):
            for query, register in enumerate(registers):
                total = builder.call(reduce, [builder.load(register)])
                builder.store(total, at(out, int64(4 * (row * width + query)), number))
        return context.get_dummy_value()

    return types.void(rows, queries, *[types.intp] * 6), generate


@compiled
def multiply_integers(rows: Any, queries: Any, scale: Any, unit: Any, out: Any) -> None:
    """scale[n] unit[q] <rows[n], queries[q]> of int8 rows `[n, k]` and int16 queries `[q, k]`, into float32 `[n, q]`.

    Rows and queries are contiguous, and no sum of products may exceed an int32.
    """
    n, k = rows.shape
    q, lines, sums = len(queries), k // LINE, np.empty(2 * QUERIES, np.int32)
    left, right, target = rows.ctypes.data, queries.ctypes.data, sums.ctypes.data
    full = q // QUERIES * QUERIES
    for block in range(0, n, BLOCK):
        stop = min(block + BLOCK, n)
        pairs = block + (stop - block) // 2 * 2
        for query in range(0, full, QUERIES):
            for row in range(block, pairs, 2):
                _sum_tile(2, QUERIES, left + row * k, k, right + 2 * query * k, 2 * k, lines, target)
                for number in range(QUERIES):
                    out[row, query + number] = sums[number]
                    out[row + 1, query + number] = sums[QUERIES + number]
        for row in range(block, stop):
            for query in range(full if row < pairs else 0, q):
                _sum_tile(1, 1, left + row * k, k, right + 2 * query * k, 2 * k, lines, target)
                out[row, query] = sums[0]
    for row in range(n):
        for query in range(q):
            rest = np.int32(0)
            for place in range(lines * LINE, k):
                rest = np.int32(rest + np.int32(rows[row, place]) * np.int32(queries[query, place]))
            out[row, query] = (out[row, query] + np.float32(rest)) * unit[query] * scale[row]
