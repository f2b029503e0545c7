"""The signed fold: on a CPU one compiled pass, for sketches and norms alike; elsewhere, torch's operations."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import numba
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

THREAD_BYTES = 1 << 20
"""What a thread must have to do to be worth waking."""


def fold(
    accumulator: Tensor, entries: Tensor, signs: npt.NDArray[np.int8], shifts: npt.NDArray[np.int64], scale: float
) -> Tensor:
    """Add scale x sign x entry to the accumulator, each block of k rotated by its shift.

    Args:
        accumulator: `[n, 2 k]`, float32.
        entries: `[n, p]`.
        signs: `[p]`.
        shifts: one for each block.
        scale: of all entries.

    Returns:
        Squared norms of the entries `[n]`, float32.
    """
    entries = entries.contiguous()
    if entries.dtype == torch.bfloat16:
        kernel, given = _fold_bfloat16, entries.view(torch.int16).numpy()
    else:
        kernel, given = _fold_float32, entries.float().numpy()
    sums = accumulator.numpy()
    squares = np.zeros(len(given), np.float32)

    def add(part: slice) -> None:
        kernel(sums[part], given[part], signs, shifts, np.float32(scale), squares[part])

    threads = max(1, min(torch.get_num_threads(), len(given), given.nbytes // THREAD_BYTES))
    if threads == 1:
        add(slice(None))
    else:
        cuts = [len(given) * thread // threads for thread in range(threads + 1)]
        list(_pool(os.getpid()).map(add, map(slice, cuts[:-1], cuts[1:])))
    return torch.from_numpy(squares)


def fold_by_block(
    accumulator: Tensor, entries: Tensor, signs: Tensor, shifts: npt.NDArray[np.int64], scale: float
) -> None:
    """The same for any device, by torch's operations, without norms; arguments as of `fold`."""
    k = accumulator.shape[1] // 2
    for shift, sign, piece in zip(shifts, torch.split(signs, k), torch.split(entries, k, 1), strict=True):
        wide = piece.to(accumulator.dtype)  # piece by piece: a wide copy of the whole would leave the cache
        accumulator.narrow(1, int(shift), len(sign)).addcmul_(wide, sign, value=scale)


@cache
def _pool(process: int) -> ThreadPoolExecutor:
    """Threads of this process: a fork has none of its parent's."""
    return ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="fold")


def _compiled(widen: Any) -> Any:
    """The pass over entries of one type; squares add up in any order, by the widest instructions there are."""

    @numba.njit(nogil=True, fastmath={"reassoc"})  # type: ignore[untyped-decorator]
    def kernel(accumulator: Any, entries: Any, signs: Any, shifts: Any, scale: Any, squares: Any) -> None:
        k = accumulator.shape[1] // 2
        for sample in range(len(entries)):
            for block in range(len(shifts)):
                given = entries[sample, block * k : (block + 1) * k]
                sign = signs[block * k : (block + 1) * k]
                sums = accumulator[sample, shifts[block] : shifts[block] + len(given)]
                square = np.float32(0)
                for place in range(len(given)):
                    entry = widen(given[place])
                    sums[place] += scale * np.float32(sign[place]) * entry
                    square += entry * entry
                squares[sample] += square

    return kernel


@numba.njit  # type: ignore[untyped-decorator]
def _same(entry: Any) -> Any:
    return entry


@numba.njit  # type: ignore[untyped-decorator]
def _from_bfloat16(bits: Any) -> Any:
    """A bfloat16 is the upper half of a float32."""
    return np.uint32(np.uint32(bits) << np.uint32(16)).view(np.float32)


_fold_float32 = _compiled(_same)
_fold_bfloat16 = _compiled(_from_bfloat16)
