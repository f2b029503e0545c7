"""Products of queries with stored rows by the fastest arithmetic that a machine has, each with a proven error."""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from retrac_scale.arrays import Bools, Float32, Float64, Int64
from retrac_scale.index import kernels
from retrac_scale.index.plain import SUMS, Product, rounding, summation
from retrac_scale.native import amx, int8, paired
from retrac_scale.native.products import multiply_integers
from retrac_scale.native.threads import over_rows

WIDEST = (2**31 - 1) // 127
"""Entries of int8 rows whose sum no int32 overflows."""
CHANCE = 1e-21
"""That the bound on a product of int8 queries fails for one row and query (Hoeffding's inequality)."""


LARGEST_TILE = 16384
"""Rows."""

MEASURED_BYTES, TURNS = 4 * 2**20, 3
"""Of rows by which the faster product is told, more than a core's own cache holds; and how often."""
CLEARLY = 1.1
"""How much faster a product has to be than those before it to be taken, since a busy machine measures badly."""


Multiply = Callable[[npt.NDArray[np.int8], Float32, Float32], None]
"""Products of some contiguous rows times their scales, into the last argument; see `CompiledProduct`."""


class CompiledProduct:
    """One checkpoint's queries for a compiled pass over int8 rows; see `plain.Product`.

    Args:
        multiply: the pass, of rows `[n, k]`, their scales `[n]`, and where scaled products go, float32 `[n, q]`.
        queries: how many.
        error: `[q]`.
        tile: rows that it best takes at a time.
    """

    def __init__(self, multiply: Multiply, queries: int, error: Float64, tile: int) -> None:
        self.error, self.tile, self._multiply = error, tile, multiply
        self._out = np.empty((tile + tile // 4, queries), np.float32)

    def weighted(self, rows: npt.NDArray[np.int8], scale: Float32) -> Float32:
        """scale[n] <rows[n], queries[q]>, roughly, `[n, q]`, in a buffer that the next call overwrites."""
        out = self._out[: len(rows)]

        def work(part: slice) -> None:
            self._multiply(np.ascontiguousarray(rows[part]), scale[part], out[part])

        over_rows(work, len(rows), rows.nbytes * out.shape[1])
        return out


class TorchProduct:
    """One checkpoint's queries, in the type of torch's fastest product; see `plain.Product`."""

    def __init__(self, matrix: Tensor, error: Float64, tile: int) -> None:
        q = matrix.shape[1]
        self.matrix = matrix
        self.error = error
        self.tile = tile
        room = tile + tile // 4
        self._product = torch.empty(room, q, dtype=matrix.dtype)
        self._float = torch.empty(room, q)
        self._rows = torch.empty(0, dtype=matrix.dtype)

    def weighted(self, rows: npt.NDArray[Any], scale: Float32) -> Float32:
        """scale[n] <rows[n], queries[q]>, roughly, `[n, q]`, in a buffer that the next call overwrites."""
        n = len(rows)
        given, out = from_dlpack(rows), self._float[:n]
        if self.matrix.device.type != "cpu":
            out.copy_(given.to(self.matrix.device).to(self.matrix.dtype) @ self.matrix)
        else:
            if given.dtype != self.matrix.dtype:
                if len(self._rows) < n:
                    self._rows = torch.empty(n, rows.shape[1], dtype=self.matrix.dtype)
                given = self._rows[:n].copy_(given)
            out.copy_(torch.mm(given, self.matrix, out=self._product[:n]))
        out.mul_(from_dlpack(scale)[:, None])
        weighted: Float32 = out.numpy()
        return weighted


def _large(tile: int) -> int:
    """A tile of rows that are read in place, so that it needs no room but for its scores."""
    return min(LARGEST_TILE, 2 * max(tile, 2048))


def by_bytes(queries: Float64, arithmetic: Float64, tile: int) -> Product:
    """A product by instructions made for bytes."""
    whole, unit, error = _integers(queries, _largest(queries), min(127, WIDEST // queries.shape[1]))
    integers, (q, _) = whole.astype(np.int8), queries.shape
    packed = int8.packed(integers) if q > 1 else ()

    def multiply(rows: npt.NDArray[np.int8], scale: Float32, out: Float32) -> None:
        if q > 1:
            int8.multiply_several(rows, *packed, scale, unit, out)
        else:
            int8.multiply_one(rows, integers[0], scale, unit[0], out.ravel())

    return CompiledProduct(multiply, q, error + arithmetic, _large(tile))


def by_pairs(queries: Float64, arithmetic: Float64, tile: int) -> Product:
    """A product of bytes by instructions of every CPU with AVX2."""
    integers, unit, error = _integers(queries, paired.meeting(queries), paired.MOST - paired.MEET)
    packed = paired.packed(integers.astype(np.int8))

    def multiply(rows: npt.NDArray[np.int8], scale: Float32, out: Float32) -> None:
        paired.multiply_paired(rows, *packed, scale, unit, out)

    return CompiledProduct(multiply, len(queries), error + arithmetic, _large(tile))


def by_integers(queries: Float64, arithmetic: Float64, tile: int) -> Product:
    """A product of int16."""
    integers, unit, error = _integers(queries, _largest(queries), min(2**15 - 1, WIDEST // queries.shape[1]))

    def multiply(rows: npt.NDArray[np.int8], scale: Float32, out: Float32) -> None:
        if len(integers) > 1:
            multiply_integers(rows, integers, scale, unit, out)
        else:
            kernels.dot(rows, integers[0], scale, unit[0], out.ravel())

    return CompiledProduct(multiply, len(queries), error + arithmetic, tile)


def by_matrices(queries: Float64, arithmetic: Float64, tile: int) -> Product:
    """A product by instructions made for matrices of bytes."""
    integers, unit, error = _integers(queries, _largest(queries), min(127, WIDEST // queries.shape[1]))
    packed, units = amx.packed(integers.astype(np.int8)), np.pad(unit, (0, -len(unit) % amx.SIDE))

    def multiply(rows: npt.NDArray[np.int8], scale: Float32, out: Float32) -> None:
        amx.multiply_pieces(rows, packed, scale, units, out)

    return CompiledProduct(multiply, len(queries), error + arithmetic, _large(tile))


def product_of(queries: Float64, norm: Float64, dtype: np.dtype[Any], checkpoints: int) -> Product:
    """The fastest product that this machine has for queries `[q, k]` and rows of a dtype, with its error."""
    q, k = queries.shape
    arithmetic = rounding(norm, checkpoints)
    tile = LARGEST_TILE if q < 8 else 4096 if q <= 64 else 2048 if q <= 128 else 512
    if torch.cuda.is_available():
        rounded = torch.from_numpy(queries).bfloat16().T.contiguous().cuda()
        return TorchProduct(rounded, arithmetic + 2.0**-6 * norm, LARGEST_TILE)
    if dtype == np.int8 and k <= WIDEST:
        with _measuring:
            way = _fastest(min(256, 2 ** (q - 1).bit_length()), k, torch.get_num_threads())
        return way(queries, 1.1 * arithmetic, tile)
    summed = summation(norm, k)
    if torch.cpu._is_avx512_bf16_supported() and q >= 16:  # queries, rows and result round to 8 bits
        rounded = torch.from_numpy(queries).bfloat16().T.contiguous()
        error = arithmetic + summed + 3.1 * 2.0**-9 * norm
        return TorchProduct(rounded, error, min(tile, 512))
    if torch.get_float32_matmul_precision() != "highest":
        summed = summed + 2.0**-6 * norm
    matrix = torch.from_numpy(queries.astype(np.float32).T.copy())
    return TorchProduct(matrix, arithmetic + summed, min(tile, 512))


Way = Callable[[Float64, Float64, int], Product]
"""A product of int8 rows with queries `[q, k]`, given what is lost `[q]` beside their rounding, and a tile's rows."""


def _ways(queries: int, entries: int) -> list[Way]:
    """Those that may be the fastest here."""
    if int8.AVAILABLE:
        return [by_bytes, by_matrices] if amx.AVAILABLE and queries > 1 else [by_bytes]
    if paired.AVAILABLE and queries > 1 and entries <= paired.WIDEST:
        return [by_pairs]  # of two queries on as fast as integers, and of more faster
    return [by_integers]


_measuring = threading.Lock()
"""Held by who asks for the fastest, since products that are timed beside each other are timed badly."""


@functools.lru_cache(maxsize=256)
def _fastest(queries: int, entries: int, threads: int) -> Way:
    """The fastest of `_ways` here, by some milliseconds of each; a later one has to be clearly faster."""
    ways = _ways(queries, entries)
    if len(ways) == 1:
        return ways[0]
    n = max(1, min(LARGEST_TILE, MEASURED_BYTES // entries))
    rows, scale = np.ones((n, entries), np.int8), np.ones(n, np.float32)
    products = [way(np.ones((queries, entries)), np.zeros(queries), n) for way in ways]
    took = [float("inf")] * len(ways)
    for _ in range(1 + TURNS):  # the first is for what is made once
        for number, product in enumerate(products):
            started = time.perf_counter()
            product.weighted(rows, scale)
            took[number] = min(took[number], time.perf_counter() - started)
    best = 0
    for number in range(1, len(ways)):
        if CLEARLY * took[number] < took[best]:
            best = number
    return ways[best]


def multiply(rows: npt.NDArray[Any], places: Int64, queries: Float64, asked: Int64, out: Float64) -> None:
    """As `plain.multiply`, bit by bit."""
    if rows.dtype == np.float16:  # which compiled passes do not know
        rows, places = rows[places].astype(np.float32), np.arange(len(places))
    kernels.multiply(np.ascontiguousarray(rows), places, queries, asked, out)


def passing(values: Float32, lowest: Float32, sign: int, counting: Bools | None) -> Int64:
    """As `plain.passing`."""
    places = np.empty(values.size, np.int64)  # of which the system gives what is written
    every = _all(values.shape) if counting is None else np.broadcast_to(counting, values.shape)
    around = lowest[_around(len(lowest))]
    return places[: kernels.passing(values.ravel(), around, np.float32(sign), every, places)].copy()


def bounded(
    places: Int64, values: Float32, unit: Float64, norm: Float32, error: Float64, faint: Float64
) -> tuple[Int64, Int64, Float64, Float64]:
    """As `plain.bounded`."""
    rows, queries, found, bound = np.empty_like(places), np.empty_like(places), *np.empty((2, len(places)))
    kernels.bounded(places, values.ravel(), unit, norm, error, faint, rows, queries, found, bound)
    return rows, queries, found, bound


@functools.lru_cache(maxsize=64)
def _all(shape: tuple[int, ...]) -> Bools:
    return np.broadcast_to(True, shape)


@functools.lru_cache(maxsize=64)
def _around(count: int) -> Int64:
    """So many numbers, and on from the first as far as a compiled pass reads at once."""
    return np.arange(count + SUMS) % count


class Largest:
    """As `plain.Largest`."""

    def __init__(self, lanes: int, k: int) -> None:
        self._largest = np.full((lanes, k), -np.inf)

    def take(self, lanes: Int64, values: Float64, floor: Float64) -> None:
        """See `plain.Largest`."""
        kernels.keep_largest(self._largest, lanes, values, floor)


def _largest(queries: Float64) -> Float64:
    """The largest magnitude of an entry of each query."""
    largest: Float64 = np.maximum(queries.max(1), -queries.min(1))
    return largest


def _integers(queries: Float64, highest: Float64, most: int) -> tuple[npt.NDArray[np.int16], Float32, Float64]:
    """Queries as integers `[q, k]` times a unit `[q]`, rounded up or down at random without bias, and the error `[q]`.

    The error of a product with a row r is a sum of independent terms, each of mean zero and in a range of unit |r_k|:
    by Hoeffding's inequality it exceeds unit |r| sqrt(ln(2/p)/2) with a probability of at most p; by Cauchy and Schwarz
    it never exceeds unit |r| sqrt(k). The smaller counts.

    Args:
        queries: `[q, k]`.
        highest: what becomes `most` units of each, `[q]`.
        most: small enough that no int32 sum overflows.
    """
    unit = np.maximum(highest * (1.000001 / most), 1e-37).astype(np.float32)
    scaled = queries * (1 / unit.astype(np.float64))[:, None]
    scaled += _dice(queries.shape[1])
    rounded = np.floor(scaled, out=scaled).astype(np.int16, order="C")
    return rounded, unit, 1.000001 * unit * np.sqrt(min(queries.shape[1], np.log(2 / CHANCE) / 2))


@functools.lru_cache(maxsize=4)
def _dice(k: int) -> Float64:
    """Random numbers in [0, 1), the same for all queries: of each query alone, the entries are independent."""
    return np.random.default_rng(0).random(k)
