"""Gradients as rows, and squared norms of long ones, as exact as their entries."""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 1024
"""Entries squared and summed in float32; sums of these blocks are added up in float64."""

FAINT = 2.0**-76
"""Below it, squares of entries may have fallen below float32's least normal number, and entries are raised first."""
RAISE = 2.0**100


def rows_of(gradient: Tensor) -> Tensor:
    """`[n, *shape]` -> `[n, p]`, where a parameter without axes has p = 1."""
    return gradient.flatten(1) if gradient.ndim > 1 else gradient[:, None]


def squared_norm(rows: Tensor) -> Tensor:
    """`[n, p]` -> `[n]`, float64, to a relative 1e-6 at any p."""
    squares = _squares(rows)
    faint = squares < FAINT
    if rows.device.type != "cpu":  # to ask whether there are any would wait for the device
        return torch.where(faint, _squares(RAISE * rows.to(_dtype(rows))) / RAISE**2, squares)
    if faint.any():
        squares[faint] = _squares(RAISE * rows[faint].to(_dtype(rows))) / RAISE**2
    return squares


def _squares(rows: Tensor) -> Tensor:
    n, p = rows.shape
    dtype = _dtype(rows)
    squares, whole = rows.new_zeros(n, dtype=torch.float64), p // BLOCK * BLOCK
    if whole:
        blocks = rows[:, :whole].view(n, -1, BLOCK)
        squares += torch.linalg.vector_norm(blocks, dim=2, dtype=dtype).double().square().sum(1)
    if whole < p:
        squares += torch.linalg.vector_norm(rows[:, whole:], dim=1, dtype=dtype).double().square()
    return squares


def _dtype(rows: Tensor) -> torch.dtype:
    return torch.promote_types(rows.dtype, torch.float32)
