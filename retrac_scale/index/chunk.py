"""Consecutive samples of an index, as a scan takes them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from retrac_scale.arrays import Bools, Float32, Float64, Int64


@dataclass(frozen=True, eq=False)
class Chunk:
    """Rows of consecutive samples, letters: c checkpoint, n row of the chunk, k entry.

    Attributes:
        rows: for each c, stored rows `[n, k]`; row x scale is the estimator's row times w_c.
        scale: `[c, n]`.
        norm: no less than |row| x |scale|, `[c, n]`.
        ids: `[n]`.
        mask: which rows count, `[n]`, or by each of several filters, `[m, n]`; None for all.
        of: of several filters, which is each query's, `[q]`.
        kept: whether the rows stay in reach anyway, at no cost: views of a file that stays mapped.
        alive: which rows are those of samples that are not deleted, `[n]`; None for all.
    """

    rows: Sequence[npt.NDArray[Any]]
    scale: Float32
    norm: Float32
    ids: npt.NDArray[Any]
    mask: Bools | None = None
    kept: bool = False
    alive: Bools | None = None
    of: Int64 | None = None

    @cached_property
    def longest(self) -> Float64:
        """The largest norm of each checkpoint, `[c]`."""
        longest: Float64 = self.norm.max(1).astype(np.float64)
        return longest

    @property
    def samples(self) -> npt.NDArray[Any]:
        """The ids of those that are not deleted."""
        return self.ids if self.alive is None else self.ids[self.alive]

    def row(self, sample: int) -> int:
        """The row of a sample, by its place among those that are not deleted."""
        return sample if self.alive is None else int(np.flatnonzero(self.alive)[sample])

    def filtered(self, mask: Bools | None, of: Int64 | None) -> Chunk:
        """The chunk with a mask of samples that are not deleted, `[n]` or `[m, n]`."""
        if mask is None or self.alive is None:
            rows = self.alive if mask is None else mask
        else:
            rows = np.zeros((*mask.shape[:-1], len(self.ids)), bool)
            rows[..., self.alive] = mask
        return self if rows is None else replace(self, mask=rows, of=None if rows.ndim == 1 else of)

    def counting(self, rows: slice) -> Bools | None:
        """Which of some rows count, `[n, 1]`, or for each query, `[n, q]`; None for all."""
        if self.mask is None:
            return None
        return self.mask[rows, None] if self.of is None else self.mask[:, rows].T[:, self.of]
