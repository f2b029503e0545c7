"""Products of int8 rows with int8 queries by the instructions that CPUs have for matrices of bytes (AMX).

One instruction multiplies 64 entries of sixteen rows with those of sixteen queries and adds up, at eight times the rate
of `int8`. What it multiplies lies in registers of 1 KB, which are read fast only from where such pieces lie side by
side: rows are copied so, a few at a time, and then met by all queries while a core's caches hold them.
"""

from __future__ import annotations

import ctypes
import platform
import sys
from typing import Any

import numpy as np
import numpy.typing as npt
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from retrac_scale.native.compiled import LINE, compiled, fetch, has
from retrac_scale.native.int8 import in_registers

SIDE = 16
"""Rows, and queries, of a register; LINE entries of each."""

PIECE = SIDE * LINE
"""Bytes of a register."""

BLOCK = 2 * SIDE
"""Rows that are multiplied at a time, with as many queries: four registers of sums, and four of what is multiplied."""

STREAMS = 4
"""Places of the next block that are fetched side by side, for from one alone too few cache lines are on the way."""


def _permitted() -> bool:
    """Whether the system keeps these registers for this process, which Linux has to be asked for once."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return False
    arch_prctl, ask, registers = 158, 0x1023, 18  # ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    return bool(ctypes.CDLL(None).syscall(arch_prctl, ask, registers) == 0)


AVAILABLE = has("amx-int8") and has("avx512bw") and _permitted()
"""Whether compiled code may use these instructions here."""

SHAPES = np.zeros(64, np.uint8)
"""Of the eight registers, as the CPU is told them: 64 bytes wide, 16 rows high."""
SHAPES[0] = 1
SHAPES[16:32].view(np.uint16)[:] = LINE
SHAPES[48:56] = SIDE


def packed(queries: npt.NDArray[np.int8]) -> npt.NDArray[np.int8]:
    """Queries `[q, k]` as the pass below reads them, `[registers, lines * 16, 16, 4]`; what is missing is zeros."""
    q, k = queries.shape
    whole = np.zeros((-(-q // SIDE) * SIDE, -(-k // LINE) * LINE), np.int8)
    whole[:q, :k] = queries
    return in_registers(whole, SIDE)


def _call(builder: Any, name: str, *arguments: Any) -> None:
    kind = ir.FunctionType(ir.VoidType(), [argument.type for argument in arguments])
    builder.call(cgutils.get_or_insert_function(builder.module, kind, f"llvm.x86.{name}"), arguments)


def _at(builder: Any, address: Any) -> Any:
    return builder.inttoptr(address, ir.PointerType(ir.IntType(8)))


@intrinsic  # type: ignore[untyped-decorator]
def _begin(typing: Any, shapes: Any) -> Any:
    """Take the registers into use, their shapes at an address."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        _call(builder, "ldtilecfg", _at(builder, arguments[0]))
        return context.get_dummy_value()

    return types.void(types.intp), generate


@intrinsic  # type: ignore[untyped-decorator]
def _end(typing: Any) -> Any:
    """Give the registers back, so that the system need not keep them."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        _call(builder, "tilerelease")
        return context.get_dummy_value()

    return types.void(), generate


@intrinsic  # type: ignore[untyped-decorator]
def _copy_lines(typing: Any, rows: Any, step: Any, last: Any, lines: Any, out: Any) -> Any:
    """SIDE rows, those after the last being the last once more, into `[lines, SIDE, LINE]`; addresses and bytes."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        rows, step, last, lines, out = arguments
        int64, line = ir.IntType(64), ir.VectorType(ir.IntType(8), LINE).as_pointer()
        starts = [rows]
        for row in range(1, SIDE):
            distance = builder.mul(step, int64(row))
            within = builder.icmp_signed("<", distance, last)
            starts.append(builder.add(rows, builder.select(within, distance, last)))
        with cgutils.for_range(builder, lines) as loop:
            place = builder.mul(loop.index, int64(LINE))
            piece = builder.add(out, builder.mul(loop.index, int64(PIECE)))
            for row, start in enumerate(starts):
                entries = builder.load(builder.inttoptr(builder.add(start, place), line), align=1)
                builder.store(entries, builder.inttoptr(builder.add(piece, int64(LINE * row)), line), align=LINE)
        return context.get_dummy_value()

    return types.void(*[types.intp] * 5), generate


@intrinsic(prefer_literal=True)  # type: ignore[untyped-decorator]
def _multiply_pieces(
    typing: Any, width: Any, rows: Any, queries: Any, lines: Any, following: Any, fetches: Any, out: Any
) -> Any:
    """Products of BLOCK rows with `width` registers of queries, int32 `[2, width, SIDE, SIDE]`, into `out`.

    Meanwhile `fetches` cache lines for each line are fetched from `following` on, and as many from where each of the
    other STREAMS is. All but the width are addresses and numbers.
    """
    count = width.literal_value

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        _, rows, queries, lines, following, fetches, out = arguments
        int8, int64 = ir.IntType(8), ir.IntType(64)
        panel, step = builder.mul(lines, int64(PIECE)), int64(LINE)
        lefts = [(int8(2 * count + side), builder.add(rows, builder.mul(panel, int64(side)))) for side in range(2)]
        right = [builder.add(queries, builder.mul(panel, int64(side))) for side in range(count)]
        rights = [(int8(2 * count + 2 + side), start) for side, start in enumerate(right)]
        sums, apart = range(2 * count), builder.mul(lines, int64(BLOCK // STREAMS * LINE))
        for register in sums:
            _call(builder, "tilezero", int8(register))
        with cgutils.for_range(builder, lines) as loop:
            place = builder.mul(loop.index, int64(PIECE))
            first = builder.mul(builder.mul(loop.index, fetches), int64(LINE))
            with cgutils.for_range(builder, fetches) as inner:
                ahead = builder.add(following, builder.add(first, builder.mul(inner.index, int64(LINE))))
                for stream in range(STREAMS):
                    fetch(builder, builder.add(ahead, builder.mul(apart, int64(stream))), 2)
            for register, start in rights:
                _call(builder, "tileloadd64", register, _at(builder, builder.add(start, place)), step)
            for row, (left, start) in enumerate(lefts):
                _call(builder, "tileloadd64", left, _at(builder, builder.add(start, place)), step)
                for column, (right, _) in enumerate(rights):
                    _call(builder, "tdpbssd", int8(row * count + column), left, right)
        for register in sums:
            piece = builder.add(out, int64(PIECE * register))
            _call(builder, "tilestored64", int8(register), _at(builder, piece), step)
        return context.get_dummy_value()

    return types.void(width, *[types.intp] * 6), generate


@intrinsic  # type: ignore[untyped-decorator]
def _store_scaled(typing: Any, found: Any, unit: Any, scale: Any, count: Any, out: Any) -> Any:
    """The first `count` of SIDE int32 at an address, times what stands at another and a number, as float32."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        found, unit, scale, count, out = arguments
        number, real = ir.IntType(32), ir.FloatType()
        numbers, reals, bits = (ir.VectorType(kind, SIDE) for kind in (number, real, ir.IntType(1)))

        def everywhere(value: Any) -> Any:
            none = ir.Constant(ir.VectorType(value.type, SIDE), ir.Undefined)
            alone = builder.insert_element(none, value, number(0))
            return builder.shuffle_vector(alone, none, ir.Constant(numbers, [0] * SIDE))

        def read(address: Any, kind: Any) -> Any:
            return builder.load(builder.inttoptr(address, kind.as_pointer()), align=4)

        products = builder.fmul(builder.sitofp(read(found, numbers), reals), read(unit, reals))
        counting = builder.icmp_signed("<", ir.Constant(numbers, list(range(SIDE))), everywhere(count))
        given = [
            builder.fmul(products, everywhere(scale)),
            builder.inttoptr(out, reals.as_pointer()),
            number(4),
            counting,
        ]
        kind = ir.FunctionType(ir.VoidType(), [reals, reals.as_pointer(), number, bits])
        builder.call(cgutils.get_or_insert_function(builder.module, kind, "llvm.masked.store.v16f32.p0"), given)
        return context.get_dummy_value()

    return types.void(types.intp, types.intp, types.float32, types.int32, types.intp), generate


@compiled
def multiply_pieces(rows: Any, queries: Any, scale: Any, unit: Any, out: Any) -> None:
    """scale[n] unit[q] <rows[n], queries[q]> of int8 rows `[n, k]` and queries `[q, k]`, into float32 `[n, q]`.

    All arrays are contiguous, and no sum of products may exceed an int32.

    Args:
        rows: int8 `[n, k]`.
        queries: those of `packed`.
        scale: float32 `[n]`.
        unit: float32, for as many queries as registers hold.
        out: float32 `[n, q]`.
    """
    n, k = rows.shape
    q, whole, lines = out.shape[1], k // LINE, (k + LINE - 1) // LINE
    panel, registers = lines * PIECE, len(queries)
    room = np.empty(2 * panel + 4 * PIECE + LINE, np.int8)  # of a block of rows, and its products with two registers
    entries = room[-room.ctypes.data % LINE :]
    copied, products = entries.ctypes.data, entries.ctypes.data + 2 * panel
    pairs = (registers + 1) // 2
    fetches = (BLOCK + STREAMS * pairs - 1) // (STREAMS * pairs)
    _begin(SHAPES.ctypes.data)
    for block in range(0, n, BLOCK):
        for side in range(2):
            first = min(block + side * SIDE, n - 1)
            here = rows.ctypes.data + first * k
            _copy_lines(here, k, (n - 1 - first) * k, whole, copied + side * panel)
            for row in range(SIDE if whole < lines else 0):  # beyond their end queries have zeros
                start = side * panel + whole * PIECE + row * LINE
                for place in range(whole * LINE, k):
                    entries[start + place - whole * LINE] = rows[min(first + row, n - 1), place]
        following = rows.ctypes.data + (block + BLOCK) * k
        for register in range(0, registers, 2):
            width, there = min(2, registers - register), queries.ctypes.data + register * panel
            if width == 2:
                _multiply_pieces(2, copied, there, lines, following, fetches, products)
            else:
                _multiply_pieces(1, copied, there, lines, following, fetches, products)
            following += fetches * LINE * lines
            for row in range(block, min(block + BLOCK, n)):
                side, within = (row - block) // SIDE, (row - block) % SIDE
                for column in range(width):
                    query, place = (register + column) * SIDE, ((side * width + column) * SIDE + within) * SIDE
                    found, target = products + 4 * place, out.ctypes.data + 4 * (row * q + query)
                    _store_scaled(found, unit.ctypes.data + 4 * query, scale[row], np.int32(q - query), target)
    _end()
