"""Exact top-k of some chunks: a cheap product with a proven error picks candidates, float64 decides."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from retrac_scale.arrays import Bools, Float32, Float64, Int64
from retrac_scale.index import plain
from retrac_scale.index.chunk import Chunk
from retrac_scale.index.plain import Arithmetic, Product, kth_largest, stable_order
from retrac_scale.native.memory import keep_freed_pages

FIRST_ROWS = 4096
"""Of a scan: a floor from a few rows spares most of the next ones."""
POOL = 8
PART_ROWS = 32
SCORE_ROWS = 512

LEAST_NORMAL = 2.0**-126
"""What an entry of a float32 product may lose by underflow."""

CANDIDATE = [("value", "f8"), ("bound", "f8"), ("chunk", "i4"), ("row", "i4"), ("lane", "i4")]
"""One sample for one lane: |score - value| <= bound, exact where bound is 0."""


@dataclass(frozen=True, eq=False)
class Found:
    """The best samples of each lane (side x query), best first.

    Attributes:
        scores: `[lane, k]`, those of opponents with their sign turned; -inf where fewer than k samples qualify.
        ids: `[lane, k]`.
        parts: what each part of the rows contributes to the score, sign not turned, `[lane, k, parts]`; nothing where
            rows have one part.
    """

    scores: Float64
    ids: npt.NDArray[Any]
    parts: Float64

    def some(self, lanes: Any) -> Found:
        """That of some lanes, chosen as an array is."""
        return Found(self.scores[lanes], self.ids[lanes], self.parts[lanes])


def top(
    chunks: Iterable[Chunk],
    queries: Float32,
    k: int,
    *,
    signs: Sequence[int] = (1,),
    query_ids: npt.NDArray[Any] | None = None,
    floor: Float64 | None = None,
    parts: int = 1,
    light: bool = False,
) -> Found:
    """The k largest sign x sum_c scale[c,n] <row[c,n], query[c,q]> of each query over all chunks, ties by smaller id.

    Scores are float64 sums of the stored rows with unquantised queries, and the order is exact: a sample is passed over
    only when its approximate score plus a bound on the approximation's error falls below k scores already seen. For
    int8 products the bound holds with a probability of 1 - 1e-21 per row and query, otherwise always.

    Args:
        chunks: read one after another; all of one dtype.
        queries: `[c, q, k]`.
        k: how many.
        signs: 1 for proponents, -1 for opponents; one lane for each sign and query, queries running fastest.
        query_ids: `[q]`, samples of these ids are left out of their own query's list.
        floor: `[lane]`, scores known to be reached by k samples elsewhere; raised on the way, may be shared by threads.
        parts: how many measurements stand side by side in a row.
        light: compute by NumPy alone, see `plain`; the answer is the same.
    """
    keep_freed_pages()
    arithmetic = plain if light else _fast()
    pool = _Pool(queries, k, signs, floor, parts, arithmetic)
    products: Sequence[Product] = ()
    for chunk in chunks:
        if not products:
            products = [
                arithmetic.product_of(
                    query / pool.unit[:, None], lengths / pool.unit, chunk.rows[0].dtype, len(queries)
                )
                for query, lengths in pool.queries
            ]
            error = np.stack([product.error for product in products]) * pool.unit
            size = min(pool.first, products[0].tile)
        number, stop = pool.hold(chunk), 0
        while stop < len(chunk.ids):
            rest = len(chunk.ids) - stop
            tile = slice(stop, stop + (rest if rest <= size + size // 4 else size))  # a short rest joins a tile
            stop, size = tile.stop, min(2 * size, products[0].tile)
            if chunk.mask is None or chunk.mask[..., tile].any():
                _scan_tile(chunk, number, tile, products, error, signs, query_ids, pool)
        if not chunk.kept:
            pool.settle()
            pool.release(number)
    return pool.best()


def _fast() -> Arithmetic:
    from retrac_scale.index import approximate  # torch and numba, which take seconds to load

    return approximate


def merge(parts: Sequence[Found], k: int) -> Found:
    """The k best of each lane out of several answers to the same queries."""
    scores, ids, shares = (
        np.concatenate([getattr(part, name) for part in parts], axis=1) for name in ("scores", "ids", "parts")
    )
    order = np.stack([np.lexsort((ids[lane], -scores[lane]))[:k] for lane in range(len(scores))])
    best, names = (np.take_along_axis(values, order, 1) for values in (scores, ids))
    return Found(best, names, np.take_along_axis(shares, order[..., None], 1))


def scores(chunk: Chunk, queries: Float32) -> Float64:
    """sum_c scale[c,n] <row[c,n], query[c,q]> of every sample, `[q, n]`.

    Products are float32 for int8 and float16 rows and float64 for float32 rows; checkpoints add up in float64.
    """
    import torch
    from torch.utils.dlpack import from_dlpack

    dtype = torch.float64 if chunk.rows[0].dtype == np.float32 else torch.float32
    out = np.zeros((queries.shape[1], len(chunk.ids)))
    for rows, scale, query in zip(chunk.rows, chunk.scale, queries, strict=True):
        matrix = torch.from_numpy(query).to(dtype)
        for start in range(0, len(rows), SCORE_ROWS):
            tile = slice(start, start + SCORE_ROWS)
            product = matrix @ from_dlpack(rows[tile]).to(dtype).T
            out[:, tile] += product.numpy() * scale[tile].astype(np.float64)
    return out if chunk.alive is None else out[:, chunk.alive]


def _scan_tile(
    chunk: Chunk,
    number: int,
    tile: slice,
    products: Sequence[Product],
    error: Float64,
    signs: Sequence[int],
    query_ids: npt.NDArray[Any] | None,
    pool: _Pool,
) -> None:
    total = products[0].weighted(chunk.rows[0][tile], chunk.scale[0, tile])
    for c, product in enumerate(products[1:], 1):
        total += product.weighted(chunk.rows[c][tile], chunk.scale[c, tile])
    q = total.shape[1]
    unit, faint = pool.unit, len(products) * chunk.rows[0].shape[1] * LEAST_NORMAL * pool.unit
    slack, counting = chunk.longest @ error + faint, chunk.counting(tile)
    for side, sign in enumerate(signs):
        part = slice(side * q, (side + 1) * q)
        new = np.flatnonzero(np.isneginf(pool.floor[part]))
        if len(new) and len(total) >= pool.k:
            own = None if query_ids is None else query_ids[new]
            kth = _reached(sign * total[:, new], pool.k, chunk.ids[tile], _of(counting, new), own)
            lanes = side * q + new
            pool.floor[lanes] = np.maximum(pool.floor[lanes], kth * unit[new] - slack[new])
        lowest = ((pool.floor[part] - slack) / unit).astype(np.float32)
        lowest = np.nextafter(lowest, np.float32(-np.inf))
        places = pool.arithmetic.passing(total, lowest, sign, counting)
        if not len(places):
            continue
        if query_ids is not None:
            places = places[chunk.ids[tile][places // q] != query_ids[places % q]]
        rows, lanes, value, bound = pool.arithmetic.bounded(
            places, total, sign * unit, chunk.norm[:, tile], error, faint
        )
        pool.add(number, tile.start + rows, side * q + lanes, value, bound)


def _reached(
    values: Float32, k: int, ids: npt.NDArray[Any], counting: Bools | None, query_ids: npt.NDArray[Any] | None
) -> Float64:
    """What k samples of a tile that count for a query reach, of values `[n, q]`: the k-th largest, or a little less.

    It is the k-th largest of the maxima of some groups of samples, which are much fewer; -inf when too few count.
    """
    if counting is not None:
        np.copyto(values, -np.inf, where=~counting)
    if query_ids is not None:
        values[ids[:, None] == query_ids] = -np.inf
    size = max(1, len(values) // (8 * k))
    groups = values[: len(values) // size * size].reshape(size, -1, values.shape[1])
    return np.partition(groups.max(0).T, -k, axis=1)[:, -k].astype(np.float64)


def _of(counting: Bools | None, queries: Int64) -> Bools | None:
    """Which rows count for some queries, of `Chunk.counting`."""
    return counting if counting is None or counting.shape[1] == 1 else counting[:, queries]


def _lengths(rows: Float64) -> Float64:
    lengths: Float64 = np.sqrt(np.einsum("nk,nk->n", rows, rows))
    return lengths


def _power_of_two(lengths: Float64) -> Float64:
    """One that is near: a query divided by it loses nothing, and its products do not leave float32's range."""
    return np.exp2(np.floor(np.log2(np.where(lengths > 0, lengths, 1.0))))


class _Pool:
    """Candidates of all lanes, and the floor under which a sample of a lane can be passed over, `[lane]`.

    `unit` `[q]` is what queries are divided by before they are multiplied in float32; all that is kept is not.
    """

    def __init__(
        self, queries: Float32, k: int, signs: Sequence[int], floor: Float64 | None, parts: int, arithmetic: Arithmetic
    ) -> None:
        self.k, self.arithmetic = k, arithmetic
        self.first = max(8 * k, FIRST_ROWS)
        self.lanes = len(signs) * queries.shape[1]
        self._least = max(4 * k, 32) * self.lanes
        self.floor = np.full(self.lanes, -np.inf) if floor is None else floor
        self._sign = np.repeat(np.array(signs, dtype=np.float64), queries.shape[1])
        self._queries = np.ascontiguousarray(queries, np.float64)
        self._lengths = np.stack([_lengths(query) for query in self._queries])
        self.unit = _power_of_two(self._lengths.max(0))
        self._largest = arithmetic.Largest(self.lanes, k)
        self._parts = parts if parts > 1 else 0
        self._chunks: list[Chunk | None] = []
        self._ids: list[npt.NDArray[Any]] = []
        self._dtype = np.dtype([*CANDIDATE, ("parts", "f8", (self._parts,))], align=True)
        self._buffer = np.empty(0, self._dtype)
        self._size = 0
        self._full = self._least

    @property
    def queries(self) -> Iterator[tuple[Float64, Float64]]:
        """For each checkpoint the queries `[q, k]` and their lengths `[q]`."""
        return zip(self._queries, self._lengths, strict=True)

    def hold(self, chunk: Chunk) -> int:
        """Keep a chunk within reach; its number."""
        self._chunks.append(chunk)
        self._ids.append(chunk.ids)
        return len(self._chunks) - 1

    def release(self, number: int) -> None:
        """Let go of a chunk whose candidates are settled."""
        self._chunks[number] = None

    def add(self, chunk: int, rows: Int64, lanes: Int64, values: Float64, bounds: Float64) -> None:
        """Take in candidates; when they have doubled, drop those that can no longer be among the best."""
        self._largest.take(lanes, values - bounds, self.floor)
        stop = self._size + len(rows)
        if stop > len(self._buffer):
            self._buffer = np.concatenate([self._held, np.empty(stop, self._dtype)])
        added = self._buffer[self._size : stop]
        added["chunk"], added["row"], added["lane"], added["value"], added["bound"] = chunk, rows, lanes, values, bounds
        added["parts"] = np.nan
        self._size = stop
        if stop >= self._full:
            value, bound, lane = (self._held[name] for name in ("value", "bound", "lane"))
            self._keep(np.flatnonzero(value + bound >= self.floor[lane]))
            if self._size > POOL * self._least:
                self.settle()
            self._full = max(2 * self._size, self._least)

    def settle(self) -> npt.NDArray[Any]:
        """Keep the k best of each lane, best first, with exact values; their sample ids."""
        value, bound, lane = (self._held[name] for name in ("value", "bound", "lane"))
        self._make_exact(value >= self._kth(lane, value)[lane])
        exact = np.flatnonzero(bound == 0)
        np.maximum(self.floor, self._kth(lane[exact], value[exact]), out=self.floor)
        self._make_exact(value + bound >= self.floor[lane])
        self._keep(np.flatnonzero((bound == 0) & (value >= self.floor[lane])))
        held, names = self._held, self._names()
        order = np.lexsort((names, -held["value"], held["lane"]))
        order = order[_places(held["lane"][order]) < self.k]
        self._keep(order)
        if self._parts:
            self._take_apart()
        return names[order]

    def best(self) -> Found:
        """The k best of each lane."""
        names, held = self.settle(), self._held
        lane, place, shape = held["lane"], _places(held["lane"]), (self.lanes, self.k)
        scores, ids, parts = np.full(shape, -np.inf), np.zeros(shape, names.dtype), np.zeros((*shape, self._parts))
        scores[lane, place], ids[lane, place], parts[lane, place] = held["value"], names, held["parts"]
        return Found(scores, ids, parts)

    @property
    def _held(self) -> npt.NDArray[Any]:
        return self._buffer[: self._size]

    def _keep(self, chosen: Int64) -> None:
        self._buffer[: len(chosen)] = self._held.take(chosen)  # a mask takes ten times as long
        self._size = len(chosen)

    def _kth(self, lanes: Int64, values: Float64) -> Float64:
        """The k-th largest of some candidates' values in each lane, -inf where there are fewer."""
        return kth_largest(lanes, values, self.lanes, self.k)

    def _make_exact(self, chosen: Bools) -> None:
        """Replace approximate values by float64 sums; each depends on its row and query alone."""
        held = self._held
        part = np.flatnonzero(chosen & (held["bound"] > 0))
        asked = held["lane"][part] % self._queries.shape[1]
        total = np.zeros(len(part))
        for number, places, row in self._by_chunk(part):
            chunk, of_row = self._chunk(number), asked[places]
            for rows, scale, queries in zip(chunk.rows, chunk.scale, self._queries, strict=True):
                product = np.empty(len(row))
                self.arithmetic.multiply(rows, row, queries, of_row, product)
                total[places] += product * scale[row]
        held["value"][part] = self._sign[held["lane"][part]] * total
        held["bound"][part] = 0

    def _take_apart(self) -> None:
        """What each part of a row contributes to the scores, where that is not known yet."""
        held = self._held
        unknown = np.flatnonzero(np.isnan(held["parts"]).any(1))
        for start in range(0, len(unknown), PART_ROWS):
            some = unknown[start : start + PART_ROWS]
            asked = self._queries[:, held["lane"][some] % self._queries.shape[1]]
            products = self._weighted(some) * asked
            held["parts"][some] = products.reshape(*products.shape[:2], self._parts, -1).sum((0, 3))

    def _weighted(self, part: Int64) -> Float64:
        """The rows of some candidates times their scales, `[c, s, k]`."""
        weighted = np.empty((len(self._queries), len(part), self._queries.shape[2]))
        for number, places, row in self._by_chunk(part):
            chunk = self._chunk(number)
            for c, rows in enumerate(chunk.rows):
                weighted[c, places] = rows[row] * chunk.scale[c, row, None]
        return weighted

    def _chunk(self, number: int) -> Chunk:
        chunk = self._chunks[number]
        assert chunk is not None
        return chunk

    def _names(self) -> npt.NDArray[Any]:
        """The sample ids of all candidates."""
        dtype = np.result_type(*{ids.dtype for ids in self._ids}) if self._ids else np.dtype(np.int64)
        names: npt.NDArray[Any] = np.zeros(self._size, dtype)
        for number, places, row in self._by_chunk(np.arange(self._size)):
            names[places] = self._ids[number][row]
        return names

    def _by_chunk(self, part: Int64) -> Iterator[tuple[int, Int64, Int64]]:
        """For each chunk that some candidates come from: its number, their places in `part`, their rows in it."""
        numbers, rows = self._held["chunk"][part], self._held["row"][part]
        order = stable_order(numbers, len(self._chunks))
        numbers, rows = numbers[order], rows[order]
        for run in _runs(numbers):
            yield int(numbers[run.start]), order[run], rows[run]


def _runs(values: npt.NDArray[Any]) -> list[slice]:
    """Where equal values stand side by side."""
    edges = [*np.flatnonzero(np.diff(values, prepend=-1)).tolist(), len(values)]
    return [slice(*pair) for pair in itertools.pairwise(edges)]


def _places(lanes: Int64) -> Int64:
    """The place of each candidate in its lane, from 0; candidates are sorted by lane."""
    places: Int64 = np.arange(len(lanes)) - np.searchsorted(lanes, lanes)
    return places
