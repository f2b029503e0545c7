"""Squared norms of long rows, as exact as their entries."""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 2048
"""Entries squared and summed in float32; sums of these blocks are added up in float64."""


def squared_norm(rows: Tensor) -> Tensor:
    """`[n, p]` -> `[n]`, float64, to a relative 1e-6 at any p."""
    whole = rows.shape[1] // BLOCK * BLOCK
    dtype = torch.promote_types(rows.dtype, torch.float32)
    blocks = rows[:, :whole].unflatten(1, (-1, BLOCK)) if whole else rows[:, :0, None]
    norms = torch.linalg.vector_norm(blocks, dim=2, dtype=dtype)
    rest = torch.linalg.vector_norm(rows[:, whole:], dim=1, dtype=dtype)
    squares: Tensor = norms.double().square().sum(1) + rest.double().square()
    return squares
