"""Products of queries with stored rows by the fastest arithmetic that a machine has, each with a proven error."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from retrac_scale.arrays import Float32, Float64, Int64
from retrac_scale.index import kernels
from retrac_scale.index.plain import rounding, summation
from retrac_scale.native.threads import over_rows

WIDEST = (2**31 - 1) // 127
"""Entries of int8 rows whose sum no int32 overflows."""
CHANCE = 1e-21
"""That the bound on a product of int8 queries fails for one row and query (Hoeffding's inequality)."""


class FastProduct:
    """One checkpoint's queries, ready for a fast product: |<r,q> - approximation| <= error[q] |r|, `[q]`."""

    def __init__(self, matrix: Tensor, unit: Float32, error: Float64, tile: int) -> None:
        q = matrix.shape[1]
        self.matrix = matrix
        self.unit = torch.from_numpy(unit)
        self.error = error
        self.tile = tile
        room = tile + tile // 4
        self._product = torch.empty(room, q, dtype=torch.int32 if matrix.dtype == torch.int8 else matrix.dtype)
        self._float = torch.empty(room, q)
        self._rows = torch.empty(0, dtype=matrix.dtype)
        if matrix.dtype == torch.int16:
            self._one = matrix.numpy()[:, 0], unit[0], self._float.numpy()[:, 0]

    def weighted(self, rows: npt.NDArray[Any], scale: Float32) -> Float32:
        """scale[n] <rows[n], queries[q]>, roughly, `[n, q]`, in a buffer that the next call overwrites."""
        n = len(rows)
        if self.matrix.dtype == torch.int16:
            query, unit, products = self._one
            over_rows(
                lambda part: kernels.dot(rows[part], query, scale[part], unit, products[:n][part]), n, rows.nbytes
            )
            return products[:n, None]
        given, out = from_dlpack(rows), self._float[:n]
        if self.matrix.device.type != "cpu":
            out.copy_(given.to(self.matrix.device).to(self.matrix.dtype) @ self.matrix)
        elif self.matrix.dtype == torch.int8:
            out.copy_(torch._int_mm(given, self.matrix, out=self._product[:n]))
        else:
            if given.dtype != self.matrix.dtype:
                if len(self._rows) < n:
                    self._rows = torch.empty(n, rows.shape[1], dtype=self.matrix.dtype)
                given = self._rows[:n].copy_(given)
            out.copy_(torch.mm(given, self.matrix, out=self._product[:n]))
        out.mul_(self.unit).mul_(from_dlpack(scale)[:, None])
        weighted: Float32 = out.numpy()
        return weighted


def product_of(queries: Float64, norm: Float64, dtype: np.dtype[Any], checkpoints: int) -> FastProduct:
    """The fastest product that this machine has for queries `[q, k]` and rows of a dtype, with its error."""
    q, k = queries.shape
    arithmetic = rounding(norm, checkpoints)
    tile = 16384 if q < 8 else 4096 if q <= 64 else 2048 if q <= 256 else 512
    if torch.cuda.is_available():
        rounded = torch.from_numpy(queries).bfloat16().T.contiguous().cuda()
        return FastProduct(rounded, np.ones(q, np.float32), arithmetic + 2.0**-6 * norm, 16384)
    # for several queries, CPUs without VNNI saturate sums, and torch's int8 products of single entries are wrong
    if dtype == np.int8 and k <= WIDEST and (q == 1 or (k > 1 and torch.cpu._is_vnni_supported())):
        integers, unit, error = _integers(queries, np.int16 if q == 1 else np.int8)
        return FastProduct(torch.from_numpy(integers).T, unit, error + 1.1 * arithmetic, tile)
    summed = summation(norm, k)
    if torch.cpu._is_avx512_bf16_supported() and q >= 16:  # queries, rows and result round to 8 bits
        rounded = torch.from_numpy(queries).bfloat16().T.contiguous()
        error = arithmetic + summed + 3.1 * 2.0**-9 * norm
        return FastProduct(rounded, np.ones(q, np.float32), error, min(tile, 512))
    if torch.get_float32_matmul_precision() != "highest":
        summed = summed + 2.0**-6 * norm
    matrix = torch.from_numpy(queries.astype(np.float32).T.copy())
    return FastProduct(matrix, np.ones(q, np.float32), arithmetic + summed, min(tile, 512))


def multiply(rows: npt.NDArray[Any], places: Int64, queries: Float64, asked: Int64, out: Float64) -> None:
    """As `plain.multiply`, bit by bit."""
    if rows.dtype == np.float16:  # which compiled passes do not know
        rows, places = rows[places].astype(np.float32), np.arange(len(places))
    kernels.multiply(rows, places, queries, asked, out)


def _integers(queries: Float64, dtype: type[np.signedinteger[Any]]) -> tuple[npt.NDArray[Any], Float32, Float64]:
    """Queries as integers `[q, k]` times a unit `[q]`, rounded up or down at random without bias, and the error `[q]`.

    The error of a product with a row r is a sum of independent terms, each of mean zero and in a range of unit |r_k|:
    by Hoeffding's inequality it exceeds unit |r| sqrt(ln(2/p)/2) with a probability of at most p; by Cauchy and Schwarz
    it never exceeds unit |r| sqrt(k). The smaller counts. Integers are small enough that no int32 sum overflows.
    """
    k = queries.shape[1]
    largest = min(np.iinfo(dtype).max, WIDEST // k)
    highest = np.maximum(queries.max(1), -queries.min(1))
    unit = np.maximum(highest * (1.000001 / largest), 1e-37).astype(np.float32)
    scaled = queries * (1 / unit.astype(np.float64))[:, None]
    scaled += _dice(k)
    rounded = np.floor(scaled, out=scaled).astype(dtype)
    return rounded, unit, 1.000001 * unit * np.sqrt(min(k, np.log(2 / CHANCE) / 2))


@functools.lru_cache(maxsize=4)
def _dice(k: int) -> Float64:
    """Random numbers in [0, 1), the same for all queries: of each query alone, the entries are independent."""
    return np.random.default_rng(0).random(k)
