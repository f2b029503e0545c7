"""The signed fold: on a CPU one compiled pass, for sketches and norms alike; elsewhere, torch's operations."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from numba import types
from numba.extending import overload
from torch import Tensor

from retrac_scale.compiled import compiled, over_rows


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
    given = (entries.view(torch.int16) if entries.dtype == torch.bfloat16 else entries.float()).numpy()
    sums = accumulator.numpy()
    squares = np.zeros(len(given), np.float32)

    def add(part: slice) -> None:
        _fold(sums[part], given[part], signs, shifts, np.float32(scale), squares[part])

    over_rows(add, len(given), given.nbytes)
    return torch.from_numpy(squares)


def fold_by_block(
    accumulator: Tensor, entries: Tensor, signs: Tensor, shifts: npt.NDArray[np.int64], scale: float
) -> None:
    """The same for any device, by torch's operations, without norms; arguments as of `fold`."""
    k = accumulator.shape[1] // 2
    for shift, sign, piece in zip(shifts, torch.split(signs, k), torch.split(entries, k, 1), strict=True):
        wide = piece.to(accumulator.dtype)  # piece by piece: a wide copy of the whole would leave the cache
        accumulator.narrow(1, int(shift), len(sign)).addcmul_(wide, sign, value=scale)


@partial(compiled, reassociate=True)
def _fold(accumulator: Any, entries: Any, signs: Any, shifts: Any, scale: Any, squares: Any) -> None:
    k = accumulator.shape[1] // 2
    for sample in range(len(entries)):
        for block in range(len(shifts)):
            given = entries[sample, block * k : (block + 1) * k]
            sign = signs[block * k : (block + 1) * k]
            sums = accumulator[sample, shifts[block] : shifts[block] + len(given)]
            square = np.float32(0)
            for place in range(len(given)):
                entry = _widened(given[place])
                sums[place] += scale * np.float32(sign[place]) * entry
                square += entry * entry
            squares[sample] += square


def _widened(entry: Any) -> Any:
    """A float32 is itself, an integer the bits of a bfloat16: the upper half of a float32."""


@overload(_widened)  # type: ignore[untyped-decorator]
def _by_type(entry: Any) -> Any:
    def same(entry: Any) -> Any:
        return entry

    def upper(entry: Any) -> Any:
        return np.uint32(np.uint32(entry) << np.uint32(16)).view(np.float32)

    return same if isinstance(entry, types.Float) else upper
