"""Weight gradients as what they are sums of: outer products, formed when and where they are consumed."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache, partial
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from retrac_scale.gradients.mixing import SETS
from retrac_scale.gradients.products import scratch
from retrac_scale.gradients.tiles import (
    LANES,
    POSITIONS,
    POSITIONS_BY_SETS,
    ROWS,
    ROWS_BY_SETS,
    TWICE,
    WIDTH,
    add_products,
    add_products_by_sets,
    mix_by_sets,
    transpose,
)
from retrac_scale.native.compiled import LINE, compiled
from retrac_scale.native.threads import over_rows

BLOCK_BYTES = 256 << 10
"""So much of a sample's gradient is formed, and consumed, at a time."""

MULTIPLICATIONS_PER_BYTE = 8
"""Done in the time that a byte takes to come from memory."""

Pairs = tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.int64]]


@dataclass(frozen=True, eq=False)
class FactoredGradients:
    """Gradients `[n, o, i, *kernel]` of n samples, float32 on a CPU, not formed yet.

    That of kernel position k is the sum over frames f and over the pairs (p, s) of k of left[n, f, :, p] times
    right[n, f, :, s].

    Attributes:
        left: `[n, f, o, p]`, in any memory order.
        right: `[n, f, i, s]`, likewise.
        kernel: the kernel's size along each spatial axis; none for a linear layer.
        pairs: positions p and s `[kernel positions, most]`, and how many of them are used `[kernel positions]`.
        with_bias: whether the gradient of the layer's bias, left's sum over f and p, goes along.
        mixer: `[r, o]`, of left, float32, r a multiple of ROWS_BY_SETS; see `gradients.mixing`.
    """

    left: Tensor
    right: Tensor
    kernel: tuple[int, ...]
    pairs: Pairs
    with_bias: bool = False
    mixer: Tensor | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the gradients."""
        o = self.left.shape[2] if self.mixer is None else len(self.mixer)
        return len(self.left), o, self.right.shape[2], *self.kernel

    @staticmethod
    def suit(layer: Any, grad_output: Tensor) -> bool:
        """Whether the gradients of a layer's weight, for such output gradients, can be given so."""
        here = grad_output.device.type == "cpu" and grad_output.dtype == torch.float32
        return here and grad_output.numel() > 0 and getattr(layer, "groups", 1) == 1  # no entry has no address

    def formed(self) -> Tensor:
        """The gradients, their input features last in memory, in `scratch` memory."""
        n, o, i = self.shape[:3]
        sums = scratch("weight", (n, o, prod(self.kernel), i), self.left)
        out, sides = sums.numpy(), self.sides()
        over_rows(lambda part: _form(sides, out, part.start, part.stop), n, self.nbytes)
        return sums.view(n, o, *self.kernel, i).movedim(-1, 2)

    def bias(self) -> Tensor:
        """The gradient of the layer's bias `[n, o]`."""
        return self.left.sum((1, 3))

    @property
    def nbytes(self) -> int:
        """What takes about as long to pass over as these to form, for `over_rows`."""
        n, o, i = self.shape[:3]
        kernel, most = self.pairs[0].shape
        formed = n * o * i * int(kernel) * max(4, int(most) // MULTIPLICATIONS_PER_BYTE)
        return formed + self.left.nbytes + self.right.nbytes  # which are read, however little is formed

    def sides(self) -> tuple[Any, ...]:
        """For compiled passes: of either side the entries, the steps between them and its size; pairs; the mixer."""
        left, right = self.left, self.right
        return (
            (_entries(left), left.stride(), tuple(left.shape[1:])),
            (_entries(right), right.stride(), tuple(right.shape[1:])),
            self.pairs,
            _UNMIXED if self.mixer is None else self.mixer.numpy(),
        )


_UNMIXED = np.zeros((0, 0), np.float32)


def _entries(x: Tensor) -> npt.NDArray[np.float32]:
    """What lies from the first entry of a tensor to its last."""
    extent = 1 + sum((size - 1) * step for size, step in zip(x.shape, x.stride(), strict=True))
    entries: npt.NDArray[np.float32] = x.as_strided((extent,), (1,)).numpy()
    return entries


@lru_cache(maxsize=128)
def pairs_of(
    kernel: tuple[int, ...],
    stride: tuple[int, ...],
    dilation: tuple[int, ...],
    padding: tuple[int, ...],
    outputs: tuple[int, ...],
    inputs: tuple[int, ...],
) -> Pairs:
    """Which outputs of a convolution see which inputs, through each position of its kernel.

    Args:
        kernel: its size along each spatial axis, as are all that follow.
        stride: of the convolution.
        dilation: of its kernel.
        padding: around its input, of zeros, which no pair stands for.
        outputs: the output's size.
        inputs: the input's.
    """
    shape = (prod(kernel), prod(outputs))
    seeing, seen, counts = np.zeros(shape, np.int64), np.zeros(shape, np.int64), np.zeros(shape[0], np.int64)
    grid = np.indices(outputs).reshape(len(outputs), -1)
    for number, place in enumerate(np.ndindex(*kernel)):
        at = [x * s + k * d - p for x, s, k, d, p in zip(grid, stride, place, dilation, padding, strict=True)]
        inside = np.logical_and.reduce([(x >= 0) & (x < size) for x, size in zip(at, inputs, strict=True)])
        counts[number] = count = np.count_nonzero(inside)
        seeing[number, :count] = np.flatnonzero(inside)
        seen[number, :count] = np.ravel_multi_index([x[inside] for x in at], inputs)
    return seeing, seen, counts


@compiled
def memory_for(sides: Any) -> Any:
    """What the passes over one sample write to.

    Returns:
        the mixer `[r, wide]`, the left side's columns `[p, wide]` and what is made of them by sets `[f, p, r, TWICE]`;
        the right side's columns `[f, s, wide]`; some rows of the gradient `[rows, k, wide]`; sums `[o]` over positions.
    """
    (_, _, (frames, o, positions)), (_, _, (_, i, inputs)), pairs, mixer = sides
    kernel, wide, r = len(pairs[0]), _rounded_up(i, LANES), len(mixer)
    padded = np.zeros((r, _rounded_up(mixer.shape[1], SETS)), np.float32)
    for row in range(r):
        for output in range(mixer.shape[1]):
            padded[row, output] = mixer[row, output]
    mixing = (
        padded,
        np.zeros((positions, padded.shape[1]), np.float32),
        np.empty((frames, positions, r, TWICE), np.float32),
    )
    columns = np.zeros((frames, inputs, wide), np.float32)
    height = ROWS if r == 0 else ROWS_BY_SETS
    rows = min(r or o, max(1, BLOCK_BYTES // (4 * kernel * wide * height)) * height)
    rows = np.empty((rows, kernel, wide), np.float32)
    return mixing, columns, rows, np.empty(o, np.float32)


@compiled
def _rounded_up(count: Any, of: Any) -> Any:
    return -(-count // of) * of


@compiled
def left_of(side: Any, sample: Any, mixing: Any) -> Any:
    """The left side of a sample: entries, and the steps between frames, rows and positions.

    Returns:
        that; and, mixed by sets, `[f, p, r, TWICE]`.
    """
    entries, steps, (frames, o, _) = side
    mixer, columns, by_sets = mixing
    entries = entries[sample * steps[0] :]
    if len(mixer) > 0:
        for frame in range(frames):
            first = entries[frame * steps[1] :]
            if steps[2] == 1 and o == mixer.shape[1]:
                mix_by_sets(first, steps[3], mixer, by_sets[frame])
            else:
                transpose(first, steps[2], steps[3], o, columns)
                mix_by_sets(columns.reshape(-1), columns.shape[1], mixer, by_sets[frame])
    return (entries, steps[1:]), by_sets


@compiled
def columns_of(side: Any, sample: Any, columns: Any) -> Any:
    """The right side of a sample, positions first: entries `[f, s, >= i]`, and the steps between frames and rows."""
    entries, steps, (_, i, _) = side
    frames, positions, wide = columns.shape
    entries = entries[sample * steps[0] :]
    if steps[2] == 1 and i == wide:
        return entries, steps[1], steps[3]
    for frame in range(frames):
        transpose(entries[frame * steps[1] :], steps[2], steps[3], i, columns[frame])
    return columns.reshape(-1), positions * wide, wide


@compiled
def form_rows(left: Any, row: Any, columns: Any, frames: Any, pairs: Any, rows: Any, ahead: Any, lines: Any) -> Any:
    """Of a sample's gradient, from `row` on.

    Args:
        left: as `left_of` gives it.
        row: the first.
        columns: as `columns_of` gives them.
        frames: how many.
        pairs: see `FactoredGradients`.
        rows: `[rows, k, wide]`, written; of a mixed side, a multiple of ROWS_BY_SETS.
        ahead: see `add_products`.
        lines: likewise.

    Returns:
        See `add_products`.
    """
    ((entries, (left_frame, row_step, left_step)), by_sets), (right, right_frame, right_step) = left, columns
    for frame in range(frames):
        second, fresh = right[frame * right_frame :], 1 if frame == 0 else 0
        if by_sets.shape[2] > 0:
            mixed = by_sets[frame, :, row:]
            ahead = add_products_by_sets(mixed, second, right_step, pairs, rows, fresh, ahead, lines)
        else:
            first = entries[frame * left_frame + row * row_step :]
            ahead = add_products(first, row_step, left_step, second, right_step, pairs, rows, fresh, ahead, lines)
    return ahead


@partial(compiled, reassociate=True)
def sum_positions(left: Any, frames: Any, positions: Any, sums: Any) -> None:
    """Into `[rows]`, what `left_of` gives, summed over frames and positions."""
    (entries, (frame_step, row_step, step)), _ = left
    for row in range(len(sums)):
        sums[row] = 0
    for frame in range(frames):
        first = frame * frame_step
        if row_step == 1:
            for place in range(positions):
                some = entries[first + place * step :]
                for row in range(len(sums)):
                    sums[row] += some[row]
            continue
        for row in range(len(sums)):
            total, start = np.float32(0), first + row * row_step
            if step == 1:
                some = entries[start : start + positions]
                for place in range(positions):
                    total += some[place]
            else:
                for place in range(positions):
                    total += entries[start + place * step]
            sums[row] += total


@compiled
def lines_ahead(sides: Any, o: Any, rows: Any) -> Any:
    """How much of the next sample's right side to fetch at a time, so that all of it is there after this sample's."""
    _, (_, steps, (frames, i, _)), pairs, mixer = sides
    stretch = POSITIONS if len(mixer) == 0 else POSITIONS_BY_SETS
    times = frames * len(pairs[0]) * -(-i // WIDTH) * -(-pairs[0].shape[1] // stretch) * -(-o // len(rows))
    return -(-4 * steps[0] // (LINE * times))


@compiled
def _form(sides: Any, out: Any, first: Any, last: Any) -> None:
    """Into `[n, o, k, i]`, for the samples from `first` to `last`."""
    left, right, pairs, _ = sides
    mixing, memory, rows, _ = memory_for(sides)
    _, o, kernel, i = out.shape
    entries, steps, (frames, _, _) = right
    lines = lines_ahead(sides, o, rows)
    for sample in range(first, last):
        columns, mixed = columns_of(right, sample, memory), left_of(left, sample, mixing)
        ahead = entries.ctypes.data + 4 * (sample + 1) * steps[0]
        for row in range(0, o, len(rows)):
            some = rows[: o - row]
            ahead = form_rows(mixed, row, columns, frames, pairs, some, ahead, lines)
            for number in range(len(some)):
                for place in range(kernel):
                    for column in range(i):
                        out[sample, row + number, place, column] = some[number, place, column]
