"""Ridge: the damped inverse of the rows' Gram matrix."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
import numpy.typing as npt

from retrac_scale.arrays import Float32, Float64

Damping = float | Literal["auto"]
Floats = npt.NDArray[np.floating]

AUTO = 0.5
"""The damping that "auto" stands for: at which two halves of the measurements agree best (`benchmarks.measurement`)."""
SUMMED_ROWS = 2048
"""Rows whose products are summed in float32, under a firm damping."""
BY_QUERIES = 8
"""Rows per entry from which queries carry a ridge: its inverse, which an index then holds, takes the bytes of so many
int8 rows per entry."""
FIRM = 0.01
"""Damping from which on a k x k system is so well conditioned that sums and products over float32 rows need no more
than float32, and change a score by less than the rounding of its rows; it is factorised in float64 all the same."""


@dataclass(frozen=True, eq=False)
class Moments:
    """What a ridge over rows phi_i `[k]` is solved from; those of different rows add up.

    Attributes:
        rows: how many, N.
        matrix: sum_i phi_i phi_i^T `[k, k]`; or, where N < k, the rows themselves `[N, k]`, which are smaller.
        dual: which of the two.
    """

    rows: int
    matrix: Float64
    dual: bool

    @staticmethod
    def of(rows: Float32, damping: Damping, *, dual: bool) -> Moments:
        """Those of some rows `[n, k]`, for a ridge of so much damping."""
        if dual:
            return Moments(len(rows), rows.astype(np.float64), dual)
        if not is_firm(damping):
            values = rows.astype(np.float64)
            return Moments(len(rows), values.T @ values, dual)
        matrix = np.zeros((rows.shape[1],) * 2)
        for start in range(0, len(rows), SUMMED_ROWS):
            some = rows[start : start + SUMMED_ROWS]
            matrix += some.T @ some
        return Moments(len(rows), matrix, dual)

    def __add__(self, other: Moments) -> Moments:
        matrix = np.concatenate([self.matrix, other.matrix]) if self.dual else self.matrix + other.matrix
        return Moments(self.rows + other.rows, matrix, self.dual)

    def __neg__(self) -> Moments:
        assert not self.dual
        return Moments(-self.rows, -self.matrix, self.dual)


@dataclass(frozen=True, eq=False)
class Ridge:
    """(K + lambda I)^-1 for K = sum_i phi_i phi_i^T over N rows, lambda = damping x trace(K) / min(N, k).

    Where N < k it is applied through the N x N system, by (K + lambda I)^-1 x = (x - Phi^T (Phi Phi^T + lambda I)^-1
    Phi x) / lambda (Woodbury).

    It stands on one side of a score: `of_queries` and `of_samples` apply it or leave rows as they are. Queries carry it
    where there are many samples, which then stay what they are, whatever the others; samples carry it where there are
    few.

    Attributes:
        rows: N.
        damping: relative to the mean of the min(N, k) eigenvalues of K that can differ from zero.
        penalty: lambda.
        factors: the inverse `[k, k]`, or, where N < k, Phi `[N, k]` and (Phi Phi^T + lambda I)^-1 Phi `[N, k]`.
        by_queries: whether queries carry it.
    """

    rows: int
    damping: float
    penalty: float
    factors: tuple[Float64, ...]
    by_queries: bool

    @cached_property
    def _factors(self) -> tuple[Floats, ...]:
        """In the type that rows are multiplied in."""
        dtype = np.float32 if len(self.factors) == 1 and is_firm(self.damping) else np.float64
        return tuple(factor.astype(dtype, copy=False) for factor in self.factors)

    def apply(self, rows: Float32) -> Floats:
        """The inverse times each row, `[n, k]`; products are float32's where the damping is firm and N >= k."""
        factors = self._factors
        x = rows.astype(factors[0].dtype, copy=False)
        if len(factors) == 1:
            return x @ factors[0]
        phi, solved = factors
        applied: Floats = (x - (x @ phi.T) @ solved) / self.penalty
        return applied

    def of_samples(self, rows: Floats) -> Floats:
        """Training rows `[n, k]` as scores take them."""
        return rows if self.by_queries else self.apply(rows)

    def of_queries(self, rows: Float32) -> Floats:
        """Rows of queries `[n, k]` as scores take them."""
        return rows.astype(np.float64) @ self.factors[0] if self.by_queries else rows

    def moments(self) -> Moments:
        """What it was solved from, to rounding; where queries carry it."""
        return Moments(self.rows, np.linalg.inv(self.factors[0]) - self.penalty * np.eye(len(self.factors[0])), False)

    def describe(self) -> dict[str, float]:
        """JSON description."""
        return {"rows": self.rows, "damping": self.damping, "lambda": self.penalty}


def solve(total: Moments, damping: Damping) -> Ridge:
    """Factorise once.

    Raises:
        ValueError: rows hold NaN or inf, all are zero, or the matrix is singular because nothing or too little is added
            to it.
    """
    import torch

    k = total.matrix.shape[1]
    gram = total.matrix @ total.matrix.T if total.dual else total.matrix
    mean = float(np.trace(gram)) / min(total.rows, k)
    if not np.isfinite(mean):
        raise ValueError("gradients hold NaN or inf; `retrac-scale verify` finds the block, sketch it again.")
    if mean == 0:
        raise ValueError("all gradients are zero, so there is nothing to fit.")
    chosen = AUTO if damping == "auto" else float(damping)
    penalty = chosen * mean
    damped = torch.from_numpy(gram + penalty * np.eye(len(gram)))
    lower, failed = torch.linalg.cholesky_ex(damped)
    pivots = lower.diagonal().square()
    if failed or (total.dual and not penalty) or pivots.min() < len(gram) * np.finfo(np.float64).eps * pivots.max():
        raise ValueError(
            f"the Gram matrix of {total.rows} rows of {k} entries is singular with damping={chosen:g}; give more, "
            'or damping="auto".'
        )
    if total.dual:
        solved = torch.cholesky_solve(torch.from_numpy(total.matrix), lower).numpy()
        return Ridge(total.rows, chosen, penalty, (total.matrix, solved), by_queries=False)
    inverse = torch.cholesky_inverse(lower).numpy()
    return Ridge(total.rows, chosen, penalty, (inverse,), by_queries=total.rows >= BY_QUERIES * k)


def is_firm(damping: Damping) -> bool:
    """Whether it is `FIRM` or more."""
    return damping == "auto" or damping >= FIRM
