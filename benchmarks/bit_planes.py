"""One query against int8 rows, their upper four bits first: fewer bytes, and the rows that may be among the best whole.

    python -m benchmarks.bit_planes demo/sketches.zarr        # the demo's, or yours

Every row is held twice: whole, and as a plane of few bits for each entry, rounded with random offsets (one for each
entry, the same for all rows), so that the error of a product is a sum of independent uniform terms. What the plane
leaves open is bounded in one of two ways: by the length of what was left out (Cauchy and Schwarz), or with the chance
of failure that queries in int8 have already, 1e-21 (a sum of uniform terms is sub-Gaussian with its own variance).
First come shares of the rows that a plane cannot pass over, then times of the same rows laid out to a million.
Both scans give the same best, in turns for each query, one thread: least CPU time, and the median of ratios.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

import retrac_scale as rs
from benchmarks.measurement_page import cpu_name
from benchmarks.pair_rows import options_of, pair_rows
from retrac_scale.index import approximate, kernels, scan
from retrac_scale.index.chunk import Chunk
from retrac_scale.native.compiled import AHEAD, LINE, compiled, has, prefetch
from retrac_scale.native.int8 import add_products_of_bytes

FOURFOLD = 4
"""Places that are read at once, as `kernels.dot` does."""
LARGEST = 127
SURELY = np.sqrt(2 * np.log(2 / approximate.CHANCE))
"""Standard deviations that a sub-Gaussian sum exceeds with a probability of at most CHANCE."""

Way = Callable[[Any], Any]


@dataclass(frozen=True)
class Plane:
    """The upper bits of rows: an entry is about step x level + offset.

    Attributes:
        levels: `[n, k]`, below 2 ** bits.
        step: between two levels.
        offset: `[k]`.
    """

    levels: Any
    step: float
    offset: Any

    @classmethod
    def of(cls, rows: Any, bits: int) -> Plane:
        """Of int8 rows `[n, k]`."""
        step = (2 * LARGEST + 1) / (2**bits - 1)
        moved = np.random.default_rng(1).uniform(0, step, rows.shape[1]) + LARGEST  # independent of `_dice`
        levels = np.floor((rows + moved) / step).astype(np.uint8)
        return cls(levels, step, 0.5 * step - moved)

    def left_out(self, rows: Any) -> Any:
        """The length of what rows have besides, `[n]`."""
        return np.linalg.norm(rows - (self.step * self.levels + self.offset), axis=1)

    @property
    def spread(self) -> float:
        """The error of a product with a query of length 1 that none exceeds, but for CHANCE."""
        return float(self.step / np.sqrt(12) * SURELY)


@intrinsic  # type: ignore[untyped-decorator]
def _sum_nibbles(typing: Any, row: Any, count: Any, query: Any) -> Any:
    """The sum of products of four bits each, in `count` bytes, with an int8 query, lower halves first; by VNNI."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        row, count, query = arguments
        int64, number = ir.IntType(64), ir.IntType(32)
        bytes_, halves, sums = (ir.VectorType(ir.IntType(b), n) for b, n in ((8, 64), (16, 32), (32, 16)))
        registers = [cgutils.alloca_once_value(builder, ir.Constant(sums, [0] * 16)) for _ in range(2)]
        mask, shift = ir.Constant(bytes_, [15] * 64), ir.Constant(halves, [4] * 32)

        def at(address: Any) -> Any:
            return builder.load(builder.inttoptr(address, bytes_.as_pointer()), align=1)

        with cgutils.for_range(builder, builder.udiv(count, int64(LINE))) as loop:
            place = builder.mul(loop.index, int64(LINE))
            packed = at(builder.add(row, place))
            upper = builder.bitcast(builder.lshr(builder.bitcast(packed, halves), shift), bytes_)
            for part, start, register in zip((packed, upper), (int64(0), count), registers, strict=True):
                factors = at(builder.add(builder.add(query, start), place))
                both = [builder.bitcast(one, sums) for one in (builder.and_(part, mask), factors)]
                builder.store(add_products_of_bytes(builder, builder.load(register), *both), register)
        kind = ir.FunctionType(number, [sums])
        reduce = cgutils.get_or_insert_function(builder.module, kind, "llvm.vector.reduce.add.v16i32")
        return builder.call(reduce, [builder.add(*[builder.load(register) for register in registers])])

    return types.int32(types.intp, types.intp, types.intp), generate


@compiled
def by_vnni(packed: Any, query: Any, scale: Any, factor: Any, rest: Any, out: Any) -> None:
    """scale[n] (factor <levels[n], query> + rest) of packed levels, two to a byte, and an int8 query."""
    n, count = packed.shape
    apart, first = n // FOURFOLD, packed.ctypes.data
    for row in range(apart):
        for place in range(0, count, LINE):
            for number in range(FOURFOLD):
                prefetch(first + AHEAD + (row + number * apart) * count + place)
        for number in range(FOURFOLD):
            one = row + number * apart
            total = _sum_nibbles(first + one * count, count, query.ctypes.data)
            out[one] = (np.float32(total) * factor + rest) * scale[one]
    for row in range(FOURFOLD * apart, n):
        total = _sum_nibbles(first + row * count, count, query.ctypes.data)
        out[row] = (np.float32(total) * factor + rest) * scale[row]


@compiled
def by_int16(packed: Any, query: Any, scale: Any, factor: Any, rest: Any, out: Any) -> None:
    """As `by_vnni`, of an int16 query, four entries to a word: what every CPU has."""
    n, count = packed.shape
    words, width = packed.view(np.uint16), count // 2
    evens, odds = query[:count].reshape(-1, 2), query[count:].reshape(-1, 2)
    first, third = evens[:, 0].copy(), evens[:, 1].copy()
    second, fourth = odds[:, 0].copy(), odds[:, 1].copy()
    for row in range(n):
        word, a, b, c, d = words[row], np.int32(0), np.int32(0), np.int32(0), np.int32(0)
        for place in range(0, count, LINE):
            prefetch(packed.ctypes.data + AHEAD + row * count + place)
        for place in range(width):
            a = np.int32(a + np.int32(np.int16(word[place] & 15)) * np.int32(first[place]))
            b = np.int32(b + np.int32(np.int16((word[place] >> 4) & 15)) * np.int32(second[place]))
            c = np.int32(c + np.int32(np.int16((word[place] >> 8) & 15)) * np.int32(third[place]))
            d = np.int32(d + np.int32(np.int16(word[place] >> 12)) * np.int32(fourth[place]))
        out[row] = (np.float32(a + b + c + d) * factor + rest) * scale[row]


@dataclass(frozen=True)
class Held:
    """Rows as both scans take them: whole with a scale and a length (which is 1), and a packed plane of four bits."""

    chunk: Chunk
    plane: Plane
    packed: Any

    @classmethod
    def of(cls, rows: Any, times: int) -> Held:
        """Rows `[n, k]`, again and again."""
        plane, half = Plane.of(rows, 4), rows.shape[1] // 2
        packed = plane.levels[:, :half] | (plane.levels[:, half:] << 4)
        scale = (1 / np.linalg.norm(rows.astype(np.float64), axis=1)).astype(np.float32)
        rows, packed, scale = (np.concatenate([one] * times) for one in (rows, packed, scale))
        norm = np.full((1, len(rows)), 1.00001, np.float32)
        return cls(Chunk([rows], scale[None], norm, np.arange(len(rows)), kept=True), plane, packed)

    def plain(self, query: Any, k: int) -> Any:
        """The k best, by the package's scan."""
        return scan.top([self.chunk], query[None, None], k).ids[0]

    def in_planes(self, query: Any, k: int, multiply: Any) -> tuple[Any, int]:
        """The k best by planes, exact as the package's are; and how many rows were read whole."""
        (rows,), (scale,) = self.chunk.rows, self.chunk.scale
        wide = query.astype(np.float64)[None]
        largest = approximate._largest(wide)
        (few,), (unit,), (error,) = approximate._integers(wide, largest, 127 if multiply is by_vnni else 2**15 - 1)
        few = few.astype(np.int8 if multiply is by_vnni else np.int16)
        (whole,), (whole_unit,), (whole_error,) = approximate._integers(wide, largest, 2**15 - 1)
        open_ = self.plane.spread * unit * float(np.linalg.norm(few.astype(np.float64)))
        factor, most = np.float32(self.plane.step * unit), np.float32(unit * (few @ self.plane.offset) + open_)
        slack, whole_slack = error + 1e-5, whole_error + 1e-5
        names, values, floor = np.empty(0, int), np.empty(0, np.float32), -np.inf
        start, size, out = 0, scan.FIRST_ROWS, np.empty(16384, np.float32)
        while start < len(rows):
            tile = slice(start, min(start + size, len(rows)))
            highest = out[: tile.stop - start]  # that a row's score can be
            multiply(self.packed[tile], few, scale[tile], factor, most, highest)
            if start == 0:
                floor = np.partition(highest - 2 * open_ * scale[tile], -k)[-k] - slack
            places = start + np.flatnonzero(highest >= floor - slack)
            better = np.empty(len(places), np.float32)
            kernels.dot(rows[places], whole, scale[places], whole_unit, better)
            names, values = np.concatenate([names, places]), np.concatenate([values, better])
            floor = np.partition(values, -k)[-k] - whole_slack
            start, size = tile.stop, min(2 * size, len(out))
        read = len(names)
        names = names[values >= floor - whole_slack]
        exact = np.empty(len(names))
        approximate.multiply(rows, names, wide, np.zeros(len(names), int), exact)
        return names[np.lexsort((names, -exact * scale[names]))][:k], read


def shares(rows: Any, queries: Any) -> None:
    """Print which rows of real gradients a plane cannot pass over."""
    norm = np.linalg.norm(rows.astype(np.float64), axis=1)
    cosines = queries @ (rows / norm[:, None]).T.astype(np.float32)
    best = np.sort(cosines, axis=1)
    said = ", ".join(f"the best {k} from {np.median(best[:, -k]):.2f} on" for k in (1, 10, 100))
    print(f"cosines, medians of {len(queries)} queries: {said}, one row in ten from {np.quantile(cosines, 0.9):.2f} on")
    for bits in (4, 2):
        plane = Plane.of(rows, bits)
        for how, bound in {"1e-21": plane.spread / norm, "length": plane.left_out(rows) / norm}.items():
            parts = []
            for k in (1, 10, 100):
                share = (cosines + bound >= best[:, -k, None]).mean()
                parts.append(f"best {k}: {100 * share:.2f} % of rows whole, {bits / 8 + share:.2f} bytes per entry")
            print(f"{bits} bits, bound by {how}, {np.median(bound):.3f} in cosine; {'; '.join(parts)}")


def ways(held: Held, k: int, read: list[int]) -> dict[str, tuple[Way, Way]]:
    """By name the product alone and the whole scan, of a query."""
    (rows,), (scale,) = held.chunk.rows, held.chunk.scale
    out, ones, one, zero = (
        np.empty(len(rows), np.float32),
        np.ones(rows.shape[1], np.int16),
        np.float32(1),
        np.float32(0),
    )
    found: dict[str, tuple[Way, Way]] = {
        "whole": (lambda _: kernels.dot(rows, ones, scale, one, out), lambda query: held.plain(query, k))
    }
    kinds = {"planes, int16": (by_int16, ones)}
    if has("avx512vnni"):
        kinds["planes, VNNI"] = by_vnni, ones.astype(np.int8)

    def of(multiply: Any, few: Any) -> tuple[Way, Way]:
        def whole_scan(query: Any) -> Any:
            best, count = held.in_planes(query, k, multiply)
            read.append(count)
            return best

        return lambda _: multiply(held.packed, few, scale, one, zero, out), whole_scan

    return found | {name: of(*kind) for name, kind in kinds.items()}


def times(held: Held, queries: Any, k: int) -> None:
    """Print how long both scans take, and the products alone, after comparing what they find."""
    read: list[int] = []
    every = ways(held, k, read)
    took: dict[tuple[str, int], list[float]] = {(name, part): [] for name in every for part in range(2)}
    for query in queries:
        expected = every["whole"][1](query)
        for (name, part), seconds in took.items():
            started = time.process_time()
            given = every[name][part](query)
            seconds.append(time.process_time() - started)
            if part:
                np.testing.assert_array_equal(given, expected)
    n = len(held.packed)
    print(f"{n} rows, best {k}: {100 * np.mean(read) / n:.2f} % of the rows read whole by planes")
    for name in every:
        said = []
        for part, what in enumerate(("product", "scan")):
            ratio = np.median(np.divide(took["whole", part], took[name, part]))
            said.append(f"{what} {1000 * min(took[name, part]):.1f} ms, {ratio:.2f} times as fast")
        print(f"  {name}: {'; '.join(said)}", flush=True)


def main() -> None:
    """See the module."""
    options = options_of(__doc__)
    torch.set_num_threads(1)
    rows, queries = pair_rows(rs.open_store(options.store))
    print(f"{cpu_name()}, load {os.getloadavg()[0]:.1f}; {len(rows)} rows of {rows.shape[1]} entries")
    shares(rows, queries)
    held = Held.of(rows, max(1, round(options.rows / len(rows))))
    for k in (10, 100):
        times(held, queries, k)


if __name__ == "__main__":
    main()
