"""Weight gradients as what they are sums of: outer products, formed when and where they are consumed."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from retrac_scale.compiled import LINE, compiled
from retrac_scale.gradients.products import scratch
from retrac_scale.gradients.tiles import POSITIONS, ROWS, WIDTH, add_products, transpose
from retrac_scale.threads import over_rows

BLOCK_BYTES = 256 << 10
"""So much of a sample's gradient is formed, and consumed, at a time."""

MULTIPLICATIONS_PER_BYTE = 8
"""Done in the time that a byte takes to come from memory."""

Pairs = tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.int64]]


@dataclass(frozen=True)
class OuterProducts:
    """Gradients `[n, o, i, *kernel]` of n samples, float32 on a CPU, not formed yet.

    That of kernel position k is the sum over frames f and over the pairs (p, s) of k of left[n, f, :, p] times
    right[n, f, :, s].

    Attributes:
        left: `[n, f, o, p]`, in any memory order.
        right: `[n, f, i, s]`, likewise.
        kernel: the kernel's size along each spatial axis; none for a linear layer.
        pairs: positions p and s `[kernel positions, most]`, and how many of them are used `[kernel positions]`.
    """

    left: Tensor
    right: Tensor
    kernel: tuple[int, ...]
    pairs: Pairs

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the gradients."""
        return len(self.left), self.left.shape[2], self.right.shape[2], *self.kernel

    @staticmethod
    def suit(layer: Any, grad_output: Tensor) -> bool:
        """Whether the gradients of a layer's weight, for such output gradients, can be given so."""
        here = grad_output.device.type == "cpu" and grad_output.dtype == torch.float32
        return here and getattr(layer, "groups", 1) == 1

    def formed(self) -> Tensor:
        """The gradients, their input features last in memory, in `scratch` memory."""
        n, o, i = self.shape[:3]
        sums = scratch("weight", (n, o, prod(self.kernel), i), self.left)
        out, sides = sums.numpy(), self.sides()
        over_rows(lambda part: _form(sides, out, part.start, part.stop), n, self.nbytes)
        return sums.view(n, o, *self.kernel, i).movedim(-1, 2)

    @property
    def nbytes(self) -> int:
        """What takes about as long to pass over as these to form, for `over_rows`."""
        return prod(self.shape[:3]) * max(4 * len(self.pairs[2]), int(self.pairs[2].sum()) // MULTIPLICATIONS_PER_BYTE)

    def sides(self) -> tuple[Any, ...]:
        """For compiled passes: both sides as their entries and the steps between, the right side's size, the pairs."""
        left, right = self.left, self.right
        return _entries(left), left.stride(), _entries(right), right.stride(), tuple(right.shape[1:]), self.pairs


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
def buffers(size: Any, o: Any, kernel: Any) -> Any:
    """Memory for one sample's columns `[f, s, wide]`, and for some rows of its gradient `[rows, k, wide]`."""
    frames, i, positions = size
    wide = -(-i // WIDTH) * WIDTH
    rows = min(o, max(1, BLOCK_BYTES // (4 * kernel * wide * ROWS)) * ROWS)
    return np.zeros((frames, positions, wide), np.float32), np.empty((rows, kernel, wide), np.float32)


@compiled
def columns_of(right: Any, steps: Any, sample: Any, i: Any, columns: Any) -> Any:
    """The right side of a sample, positions first: entries `[f, s, >= i]`, and the steps between frames and rows."""
    frames, positions, wide = columns.shape
    if steps[2] == 1 and i == wide:
        return right[sample * steps[0] :], steps[1], steps[3]
    for frame in range(frames):
        start = sample * steps[0] + frame * steps[1]
        transpose(right[start:], steps[2], steps[3], i, columns[frame])
    return columns.reshape(-1), positions * wide, wide


@compiled
def form_rows(
    left: Any,
    steps: Any,
    sample: Any,
    row: Any,
    columns: Any,
    frames: Any,
    pairs: Any,
    rows: Any,
    ahead: Any,
    lines: Any,
) -> Any:
    """Of a sample's gradient, from `row` on; `columns` as `columns_of` gives them, the rest as of `add_products`."""
    rows[:] = 0
    right, frame_step, right_step = columns
    for frame in range(frames):
        start = sample * steps[0] + frame * steps[1] + row * steps[2]
        ahead = add_products(
            left[start:], steps[2], steps[3], right[frame * frame_step :], right_step, *pairs, rows, ahead, lines
        )
    return ahead


@compiled
def lines_ahead(step: Any, size: Any, o: Any, pairs: Any, rows: Any) -> Any:
    """How much of the next sample's right side to fetch at a time, so that all of it is there after this sample's."""
    frames, i, _ = size
    times = frames * len(pairs[0]) * -(-i // WIDTH) * -(-pairs[0].shape[1] // POSITIONS) * -(-o // len(rows))
    return -(-4 * step // (LINE * times))


@compiled
def _form(sides: Any, out: Any, first: Any, last: Any) -> None:
    """Into `[n, o, k, i]`, for the samples from `first` to `last`."""
    left, left_steps, right, right_steps, size, pairs = sides
    _, o, kernel, i = out.shape
    memory, rows = buffers(size, o, kernel)
    for sample in range(first, last):
        columns = columns_of(right, right_steps, sample, i, memory)
        for row in range(0, o, len(rows)):
            some = rows[: o - row]
            form_rows(left, left_steps, sample, row, columns, size[0], pairs, some, 0, 0)
            out[sample, row : row + len(some)] = some[:, :, :i]
