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

from retrac_scale.gradients.factored import (
    FactoredGradients,
    columns_of,
    form_rows,
    left_of,
    lines_ahead,
    memory_for,
    sum_positions,
)
from retrac_scale.gradients.tiles import LANES
from retrac_scale.native.compiled import compiled
from retrac_scale.native.threads import Shared, SharedPass, over_rows

BLOCK = 2048 if LANES > 4 else 512
"""Entries whose squares are added up in float32, the fewer the fewer sums; these sums are added up in float64."""

Signs = tuple[npt.NDArray[np.int8], npt.NDArray[np.int64]]
"""Of a parameter's entries `[p]`, and by how much each block of k of them is rotated."""


def fold(
    accumulator: Tensor,
    entries: Tensor | FactoredGradients,
    signs: Signs,
    scale: float,
    of_bias: Signs | None = None,
) -> Tensor:
    """Add scale x sign x entry to the accumulator, each block of k rotated by its shift.

    Args:
        accumulator: `[n, 2 k]`, float32.
        entries: `[n, p]`, or what they are sums of; input features last.
        signs: of the entries.
        scale: of all entries.
        of_bias: of the bias that goes along with `FactoredGradients`, whose scale is 1.

    Returns:
        Squared norms of the entries `[n]`, float64.
    """
    sums = accumulator.numpy()
    squares = np.zeros(len(sums))
    if isinstance(entries, FactoredGradients):
        arguments = (entries.sides(), sums, (signs, of_bias or _NONE), np.float32(scale), squares)
        _formed_and_folded(arguments, len(sums), entries.nbytes)
        return torch.from_numpy(squares)
    entries = entries.contiguous()
    given = (entries.view(torch.int16) if entries.dtype == torch.bfloat16 else entries.float()).numpy()

    def add(part: slice) -> None:
        _fold(sums[part], given[part], signs, np.float32(scale), squares[part])

    over_rows(add, len(given), given.nbytes)
    return torch.from_numpy(squares)


_NONE: Signs = np.zeros(0, np.int8), np.zeros(0, np.int64)


def fold_by_block(
    accumulator: Tensor, entries: Tensor, signs: Tensor, shifts: npt.NDArray[np.int64], scale: float
) -> None:
    """The same for any device, by torch's operations, without norms; arguments as of `fold`."""
    k = accumulator.shape[1] // 2
    for shift, sign, piece in zip(shifts, torch.split(signs, k), torch.split(entries, k, 1), strict=True):
        wide = piece.to(accumulator.dtype)  # piece by piece: a wide copy of the whole would leave the cache
        accumulator.narrow(1, int(shift), len(sign)).addcmul_(wide, sign, value=scale)


@compiled
def _fold(accumulator: Any, entries: Any, signs: Any, scale: Any, squares: Any) -> None:
    for sample in range(len(entries)):
        squares[sample] += _fold_from(np.int64(0), accumulator[sample], entries[sample], signs, scale)


@compiled
def _form_and_fold(sides: Any, accumulator: Any, signs: Any, scale: Any, squares: Any, first: Any, last: Any) -> None:
    """A sample's gradient is folded while it is formed, some rows at a time; see `FactoredGradients.sides`."""
    left, right, pairs, mixer = sides
    signs, of_bias = signs
    entries, steps, (frames, i, _) = right
    mixing, memory, rows, sums = memory_for(sides)
    o, kernel = len(mixer) or len(sums), len(pairs[0])
    lines = lines_ahead(sides, o, rows)
    for sample in range(first, last):
        columns, mixed = columns_of(right, sample, memory), left_of(left, sample, mixing)
        ahead = entries.ctypes.data + 4 * (sample + 1) * steps[0]
        for row in range(0, o, len(rows)):
            some = rows[: o - row]
            ahead = form_rows(mixed, row, columns, frames, pairs, some, ahead, lines)
            formed = some.reshape(-1) if some.shape[2] == i else some[:, :, :i].copy().reshape(-1)
            squares[sample] += _fold_from(row * kernel * i, accumulator[sample], formed, signs, scale)
        if len(of_bias[0]) > 0:
            sum_positions(mixed, frames, left[2][2], sums)
            squares[sample] += _fold_from(np.int64(0), accumulator[sample], sums, of_bias, np.float32(1))


_numbers, _table = np.zeros(1, np.float32), np.zeros((1, 1), np.int64)
_side = _numbers, (0, 0, 0, 0), (0, 0, 0)
_sides = _side, _side, (_table, _table, _table[0]), _numbers[None]
_shared = Shared((_sides, _numbers[None], (_NONE, _NONE), np.float32(0), np.zeros(1)))
_run, _taken, _after = _shared.run, _shared.taken, _shared.after


def _member(address: Any) -> None:
    count, parts, rows, arguments = _taken(address)
    part = _after(count)
    while part < parts:
        _form_and_fold(*arguments, rows * part // parts, rows * (part + 1) // parts)
        _after(count + 8)
        part = _after(count)


@compiled
def _share(team: Any, member: Any, count: Any, parts: Any, rows: Any, arguments: Any) -> None:
    _run(team, member, (count, parts, rows, arguments))


_formed_and_folded = SharedPass(_form_and_fold, _share, _member)


@partial(compiled, reassociate=True)
def _fold_from(start: Any, accumulator: Any, entries: Any, signs: Any, scale: Any) -> Any:
    """Fold entries that begin at `start` of all; gives their squared norm."""
    signs, shifts = signs
    k = len(accumulator) // 2
    total: Any = 0.0
    stop = start + len(entries)
    for block in range(start // k, (stop + k - 1) // k):
        last = min(stop, (block + 1) * k)
        for begin in range(max(start, block * k), last, BLOCK):
            end = min(begin + BLOCK, last)
            given, sign = entries[begin - start : end - start], signs[begin:end]
            bucket = shifts[block] + begin - block * k
            sums = accumulator[bucket : bucket + len(given)]
            square = np.float32(0)
            for place in range(len(given)):
                entry = _widened(given[place])
                sums[place] += scale * np.float32(sign[place]) * entry
                square += entry * entry
            total += square
    return total


def _widened(entry: Any) -> Any:
    """A float32 is itself, an integer the bits of a bfloat16: the upper half of a float32."""


@overload(_widened)  # type: ignore[untyped-decorator]
def _by_type(entry: Any) -> Any:
    def same(entry: Any) -> Any:
        return entry

    def upper(entry: Any) -> Any:
        return np.uint32(np.uint32(entry) << np.uint32(16)).view(np.float32)

    return same if isinstance(entry, types.Float) else upper
