"""Sums of outer products in the registers of a CPU, for the weight gradients of single samples.

Such a gradient is a small matrix product over few positions, which libraries made for large ones compute at a fraction
of the processor's rate, and a convolution's needs its windows copied out first. Here both sides are read where they
lie, one pair of positions after another, while a tile of the result stays in registers.
"""

from __future__ import annotations

import itertools
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from retrac_scale.gradients.mixing import SETS
from retrac_scale.native.compiled import LINE, compiled, has, prefetch, prefetch_beyond

LANES = 16 if has("avx512f") else 8 if has("avx") else 4
"""Numbers in a vector register."""

ROWS = 6 if LANES == 8 else 8
"""Of a tile that is WIDTH wide: with them, it takes most of the registers there are, 16 or 32."""

WIDTH = 2 * LANES

BROAD = LANES != 8
"""Whether the registers hold a tile of 4 rows that is twice as wide."""

ROWS_BY_SETS = 4
"""Of a tile whose left side has been mixed."""

POSITIONS, POSITIONS_BY_SETS = 128, 32
"""Summed over at a time, so that what a tile reads stays in a core's caches."""

PLACES = 4 if LANES == 16 else 1
"""Positions mixed at a time, of which the registers hold ROWS_BY_SETS times SETS sums each."""

TWICE = 2 * SETS
"""Numbers that each row of a left side by sets takes: those of its sets twice, so that any SETS in a row are all."""


@intrinsic(prefer_literal=True)  # type: ignore[untyped-decorator]
def _add_tile(
    typing: Any,
    rows: Any,
    vectors: Any,
    sets: Any,
    left: Any,
    row_step: Any,
    left_step: Any,
    right: Any,
    right_step: Any,
    meets: Any,
    met: Any,
    count: Any,
    out: Any,
    out_step: Any,
    fresh: Any,
) -> Any:
    """Add the products of `count` pairs of positions to `rows` x `vectors` registers; addresses and steps in bytes.

    What stands in `out` counts unless `fresh`. The left side has `sets` numbers for each row, which take turns over
    the right side's columns.
    """
    height, width, turns = rows.literal_value, vectors.literal_value, sets.literal_value

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        _, _, _, left, row_step, left_step, right, right_step, meets, met, count, out, out_step, fresh = arguments
        number, index, int64 = ir.FloatType(), ir.IntType(32), ir.IntType(64)
        vector = ir.VectorType(number, LANES)
        each = min(turns, LANES)  # numbers that a register's lanes take turns with
        few = ir.VectorType(number, each)
        around = ir.Constant(ir.VectorType(index, LANES), [lane % each for lane in range(LANES)])
        kind = ir.FunctionType(vector, [vector] * 3)
        multiply_add = cgutils.get_or_insert_function(builder.module, kind, f"llvm.fma.v{LANES}f32")

        def at(address: Any, offset: Any, kind: Any) -> Any:
            return builder.inttoptr(builder.add(address, offset), kind.as_pointer())

        def stepping(base: Any, by: Any) -> list[Any]:
            return [builder.add(base, builder.mul(by, int64(row))) for row in range(height)]

        parts = [int64(4 * LANES * part) for part in range(width)]
        lefts, targets = stepping(left, row_step), stepping(out, out_step)
        sums = [[cgutils.alloca_once(builder, vector) for _ in parts] for _ in targets]
        with builder.if_else(builder.icmp_signed("!=", fresh, int64(0))) as (then, otherwise):
            for branch, zero in ((then, True), (otherwise, False)):
                with branch:
                    for registers, target in zip(sums, targets, strict=True):
                        for register, part in zip(registers, parts, strict=True):
                            before = ir.Constant(vector, [0.0] * LANES)
                            builder.store(before if zero else builder.load(at(target, part, vector), align=4), register)
        with cgutils.for_range(builder, count) as loop:
            place = builder.mul(loop.index, int64(8))
            of_left = builder.mul(builder.load(at(meets, place, int64)), left_step)
            of_right = builder.add(right, builder.mul(builder.load(at(met, place, int64)), right_step))
            columns = [builder.load(at(of_right, part, vector), align=4) for part in parts]
            for registers, address in zip(sums, lefts, strict=True):
                factors = []
                for start in range(0, min(turns, width * LANES), each):
                    some = builder.load(at(address, builder.add(of_left, int64(4 * start)), few), align=4)
                    factors.append(builder.shuffle_vector(some, ir.Constant(few, ir.Undefined), around))
                for register, column, factor in zip(registers, columns, itertools.cycle(factors)):
                    builder.store(builder.call(multiply_add, [factor, column, builder.load(register)]), register)
        for registers, target in zip(sums, targets, strict=True):
            for register, part in zip(registers, parts, strict=True):
                builder.store(builder.load(register), at(target, part, vector), align=4)
        return context.get_dummy_value()

    return types.void(rows, vectors, sets, *[types.intp] * 11), generate


@intrinsic(prefer_literal=True)  # type: ignore[untyped-decorator]
def _mix_places(
    typing: Any,
    places: Any,
    left: Any,
    left_step: Any,
    mixer: Any,
    mixer_step: Any,
    count: Any,
    out: Any,
    out_step: Any,
) -> Any:
    """Mix some positions by ROWS_BY_SETS rows of all sets; addresses and steps in bytes, `count` times SETS outputs.

    What the sets multiply an output by depends on its number modulo SETS. So outputs are added up by those numbers,
    each row in its own way, and the sets are a Hadamard transform of the SETS sums.
    """
    positions = places.literal_value

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        _, left, left_step, mixer, mixer_step, count, out, out_step = arguments
        int64, index, lanes = ir.IntType(64), ir.IntType(32), range(SETS)
        vector = ir.VectorType(ir.FloatType(), SETS)
        kind = ir.FunctionType(vector, [vector] * 3)
        multiply_add = cgutils.get_or_insert_function(builder.module, kind, f"llvm.fma.v{SETS}f32")

        def at(base: Any, by: Any, number: int, offset: Any) -> Any:
            address = builder.add(builder.add(base, builder.mul(by, int64(number))), offset)
            return builder.inttoptr(address, vector.as_pointer())

        sums = [[cgutils.alloca_once(builder, vector) for _ in range(positions)] for _ in range(ROWS_BY_SETS)]
        for register in itertools.chain(*sums):
            builder.store(ir.Constant(vector, [0.0] * SETS), register)
        with cgutils.for_range(builder, count) as loop:
            some = builder.mul(loop.index, int64(4 * SETS))
            outputs = [builder.load(at(left, left_step, place, some), align=4) for place in range(positions)]
            for row, registers in enumerate(sums):
                factors = builder.load(at(mixer, mixer_step, row, some), align=4)
                for register, values in zip(registers, outputs, strict=True):
                    builder.store(builder.call(multiply_add, [factors, values, builder.load(register)]), register)
        for row, registers in enumerate(sums):
            for place, register in enumerate(registers):
                value = builder.load(register)
                for bit in (1, 2, 4, 8):
                    other = ir.Constant(ir.VectorType(index, SETS), [lane ^ bit for lane in lanes])
                    signs = ir.Constant(vector, [-1.0 if lane & bit else 1.0 for lane in lanes])
                    swapped = builder.shuffle_vector(value, ir.Constant(vector, ir.Undefined), other)
                    value = builder.call(multiply_add, [signs, value, swapped])
                for twice in (0, SETS):
                    builder.store(value, at(out, out_step, place, int64(4 * (TWICE * row + twice))), align=4)
        return context.get_dummy_value()

    return types.void(places, *[types.intp] * 7), generate


@compiled
def mix_by_sets(left: Any, step: Any, mixer: Any, out: Any) -> None:
    """From entries `[p, o]`, between whose rows lie `step`, mixed by `[r, o]`, into `[p, r, TWICE]`.

    r is a multiple of ROWS_BY_SETS, o of SETS; outputs, and those of the mixer, are contiguous.
    """
    positions, r, _ = out.shape
    full = positions // PLACES * PLACES
    source, by, count = left.ctypes.data, 4 * step, mixer.shape[1] // SETS
    target, out_step = out.ctypes.data, 4 * TWICE * r
    for row in range(0, r, ROWS_BY_SETS):
        rows, of_row = mixer.ctypes.data + 4 * row * mixer.shape[1], target + 4 * TWICE * row
        for place in range(0, full, PLACES):
            here, there = source + place * by, of_row + place * out_step
            _mix_places(PLACES, here, by, rows, 4 * mixer.shape[1], count, there, out_step)
        for place in range(full, positions):
            here, there = source + place * by, of_row + place * out_step
            _mix_places(1, here, by, rows, 4 * mixer.shape[1], count, there, out_step)


@intrinsic  # type: ignore[untyped-decorator]
def _transpose_tile(typing: Any, source: Any, source_step: Any, target: Any, target_step: Any) -> Any:
    """LANES x LANES numbers; addresses and steps in bytes."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        source, source_step, target, target_step = arguments
        index, int64 = ir.IntType(32), ir.IntType(64)
        vector = ir.VectorType(ir.FloatType(), LANES)

        def row(base: Any, by: Any, number: int) -> Any:
            return builder.inttoptr(builder.add(base, builder.mul(by, int64(number))), vector.as_pointer())

        rows = [builder.load(row(source, source_step, number), align=4) for number in range(LANES)]
        size = 1
        while size < LANES:  # swap the off-diagonal squares of this size
            for first in range(LANES):
                if first & size == 0:
                    pair = rows[first], rows[first + size]
                    upper = [lane if lane & size == 0 else LANES + lane - size for lane in range(LANES)]
                    lower = [lane + size if lane & size == 0 else LANES + lane for lane in range(LANES)]
                    rows[first], rows[first + size] = (
                        builder.shuffle_vector(*pair, ir.Constant(ir.VectorType(index, LANES), lanes))
                        for lanes in (upper, lower)
                    )
            size *= 2
        for number, value in enumerate(rows):
            builder.store(value, row(target, target_step, number), align=4)
        return context.get_dummy_value()

    return types.void(*[types.intp] * 4), generate


@compiled
def transpose(source: Any, step: Any, inner: Any, i: Any, target: Any) -> None:
    """Entries `[i, s]`, between which lie `step` and `inner`, into `[s, >= i]`."""
    positions, wide = target.shape
    by_tile, by_row = 0, 0
    if inner == 1:
        by_tile, by_row = i // LANES * LANES, positions // LANES * LANES
    for column in range(0, by_tile, LANES):
        for row in range(0, by_row, LANES):
            of_source, of_target = column * step + row, row * wide + column
            for line in range(LANES, 2 * LANES):
                prefetch(source.ctypes.data + 4 * (of_source + line * step))
            _transpose_tile(source.ctypes.data + 4 * of_source, 4 * step, target.ctypes.data + 4 * of_target, 4 * wide)
    for row in range(positions):
        for column in range(by_tile if row < by_row else 0, i):
            target[row, column] = source[column * step + row * inner]


@compiled
def _fetch(ahead: Any, lines: Any) -> Any:
    for _ in range(lines):
        prefetch_beyond(ahead)
        ahead += LINE
    return ahead


@compiled
def add_products(
    left: Any,
    step: Any,
    inner: Any,
    right: Any,
    next_right: Any,
    pairs: Any,
    out: Any,
    fresh: Any,
    ahead: Any,
    lines: Any,
) -> Any:
    """To `[o, k, i]`, for each k the sum over its pairs of positions of one column of each side.

    Args:
        left: entries `[o, p]`, float32, between which lie `step` and `inner`.
        step: see `left`.
        inner: see `left`.
        right: rows `[s, i]`, float32, between which lie `next_right` entries; i is a multiple of LANES.
        next_right: see `right`.
        pairs: positions p and s, `[k, most]` both, and how many of them are used, `[k]`.
        out: float32.
        fresh: whether what stands in it does not count, 1 or 0.
        ahead: address from which on memory is fetched meanwhile, which need not be a valid one.
        lines: as many cache lines of it for each kernel position and WIDTH inputs.

    Returns:
        The address after them.
    """
    meets, met, counts = pairs
    o, kernel, i = out.shape
    full = o // ROWS * ROWS
    few = full + (o - full) // 4 * 4
    row_step, left_step, right_step, out_step = 4 * step, 4 * inner, 4 * next_right, 4 * kernel * i
    for begin in range(0, meets.shape[1], POSITIONS):
        new = fresh if begin == 0 else 0
        for column in range(0, i, WIDTH):
            for place in range(kernel):
                ahead = _fetch(ahead, lines)
                count = min(POSITIONS, counts[place] - begin)
                before = 8 * (place * meets.shape[1] + begin)
                a, b = meets.ctypes.data + before, met.ctypes.data + before
                x, y = right.ctypes.data + 4 * column, out.ctypes.data + 4 * (place * i + column)
                if i - column < WIDTH:
                    for row in range(0, full, ROWS):
                        g, z = left.ctypes.data + row * row_step, y + row * out_step
                        _add_tile(ROWS, 1, 1, g, row_step, left_step, x, right_step, a, b, count, z, out_step, new)
                    for row in range(full, o):
                        g, z = left.ctypes.data + row * row_step, y + row * out_step
                        _add_tile(1, 1, 1, g, row_step, left_step, x, right_step, a, b, count, z, out_step, new)
                    continue
                for row in range(0, full, ROWS):
                    g, z = left.ctypes.data + row * row_step, y + row * out_step
                    _add_tile(ROWS, 2, 1, g, row_step, left_step, x, right_step, a, b, count, z, out_step, new)
                for row in range(full, few, 4):
                    g, z = left.ctypes.data + row * row_step, y + row * out_step
                    if not BROAD or i % (2 * WIDTH) != 0:
                        _add_tile(4, 2, 1, g, row_step, left_step, x, right_step, a, b, count, z, out_step, new)
                    elif column % (2 * WIDTH) == 0:
                        _add_tile(4, 4, 1, g, row_step, left_step, x, right_step, a, b, count, z, out_step, new)
                for row in range(few, o):
                    g, z = left.ctypes.data + row * row_step, y + row * out_step
                    _add_tile(1, 2, 1, g, row_step, left_step, x, right_step, a, b, count, z, out_step, new)
    return ahead


@compiled
def add_products_by_sets(
    left: Any, right: Any, next_right: Any, pairs: Any, out: Any, fresh: Any, ahead: Any, lines: Any
) -> Any:
    """The same for a left side `[p, >= o, TWICE]`, of which column i of `out` at place k has set i + k; o is in fours.

    Arguments and what is returned are as of `add_products`.
    """
    meets, met, counts = pairs
    o, kernel, i = out.shape
    step, left_step, right_step, out_step = 4 * TWICE, left.strides[0], 4 * next_right, 4 * kernel * i
    for begin in range(0, meets.shape[1], POSITIONS_BY_SETS):
        new = fresh if begin == 0 else 0
        for column in range(0, i, WIDTH):
            for place in range(kernel):
                ahead = _fetch(ahead, lines)
                count = min(POSITIONS_BY_SETS, counts[place] - begin)
                before = 8 * (place * meets.shape[1] + begin)
                a, b = meets.ctypes.data + before, met.ctypes.data + before
                x, y = right.ctypes.data + 4 * column, out.ctypes.data + 4 * (place * i + column)
                side = left.ctypes.data + 4 * ((column + place) % SETS)
                if BROAD and column % (2 * WIDTH) == WIDTH and column + WIDTH <= i:
                    continue  # was in the tiles of the column before
                for row in range(0, o, ROWS_BY_SETS):
                    g, z = side + row * step, y + row * out_step
                    if BROAD and column + 2 * WIDTH <= i:
                        _add_tile(
                            ROWS_BY_SETS, 4, SETS, g, step, left_step, x, right_step, a, b, count, z, out_step, new
                        )
                    elif column + WIDTH <= i:
                        _add_tile(
                            ROWS_BY_SETS, 2, SETS, g, step, left_step, x, right_step, a, b, count, z, out_step, new
                        )
                    else:
                        _add_tile(
                            ROWS_BY_SETS, 1, SETS, g, step, left_step, x, right_step, a, b, count, z, out_step, new
                        )
    return ahead
