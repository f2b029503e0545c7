"""Squared norms of long rows, as exact as their entries."""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 1024
"""Entries squared and summed in float32; sums of these blocks are added up in float64."""

FAINT = 2.0**-76
"""Below it, squares of entries may have fallen below float32's least normal number, and they are taken in float64."""


def squared_norm(rows: Tensor) -> Tensor:
    """`[n, p]` -> `[n]`, float64, to a relative 1e-6 at any p."""
    n, p = rows.shape
    dtype = torch.promote_types(rows.dtype, torch.float32)
    squares, whole = rows.new_zeros(n, dtype=torch.float64), p // BLOCK * BLOCK
    if whole:
        blocks = rows[:, :whole].view(n, -1, BLOCK)
        squares += torch.linalg.vector_norm(blocks, dim=2, dtype=dtype).double().square().sum(1)
    if whole < p:
        squares += torch.linalg.vector_norm(rows[:, whole:], dim=1, dtype=dtype).double().square()
    if (faint := squares < FAINT).any():
        squares[faint] = rows[faint].double().square().sum(1)
    return squares
