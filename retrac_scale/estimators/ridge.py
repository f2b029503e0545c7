"""Ridge: the damped inverse of the rows' Gram matrix, in float64."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch

from retrac_scale.store.encoding import Float32, Float64

Damping = float | Literal["auto"]

LEAST, MOST = 1e-6, 1e3
"""Bounds of the damping that is chosen automatically."""


@dataclass(frozen=True, eq=False)
class Moments:
    """What a ridge over rows phi_i `[k]` is solved from; parts over different rows add up.

    Attributes:
        rows: how many, N.
        matrix: sum_i phi_i phi_i^T `[k, k]`; or, where N < k, the rows themselves `[N, k]`, which are smaller.
        dual: which of the two.
        fourth: sum_i |phi_i|^4.
    """

    rows: int
    matrix: Float64
    dual: bool
    fourth: float

    def __add__(self, other: Moments) -> Moments:
        matrix = np.concatenate([self.matrix, other.matrix]) if self.dual else self.matrix + other.matrix
        return Moments(self.rows + other.rows, matrix, self.dual, self.fourth + other.fourth)


def moments(pieces: Iterable[Float32], width: int, *, dual: bool) -> Moments:
    """Those of rows `[n, k]` that come in pieces; of the primal kind, one matrix is held whatever their number."""
    total, count, fourth, kept = np.zeros((0 if dual else width, width)), 0, 0.0, []
    for piece in pieces:
        rows = piece.astype(np.float64)
        count += len(rows)
        fourth += float((np.einsum("nk,nk->n", rows, rows) ** 2).sum())
        if dual:
            kept.append(rows)
        else:
            total += rows.T @ rows
    return Moments(count, np.concatenate([total, *kept]), dual, fourth)


@dataclass(frozen=True, eq=False)
class Ridge:
    """(K + lambda I)^-1 for K = sum_i phi_i phi_i^T over N rows, lambda = damping x trace(K) / k.

    Where N < k it is applied through the N x N system, by (K + lambda I)^-1 x = (x - Phi^T (Phi Phi^T + lambda I)^-1
    Phi x) / lambda (Woodbury).

    Attributes:
        rows: N.
        damping: relative to the mean eigenvalue of K.
        penalty: lambda.
        factors: the inverse `[k, k]`, or, where N < k, Phi `[N, k]` and (Phi Phi^T + lambda I)^-1 Phi `[N, k]`.
    """

    rows: int
    damping: float
    penalty: float
    factors: tuple[Float64, ...]

    def apply(self, rows: npt.NDArray[np.floating]) -> Float64:
        """The inverse times each row, `[n, k]`."""
        x = rows.astype(np.float64)
        if len(self.factors) == 1:
            return x @ self.factors[0]
        phi, solved = self.factors
        return (x - (x @ phi.T) @ solved) / self.penalty

    def describe(self) -> dict[str, float]:
        """JSON description."""
        return {"rows": self.rows, "damping": self.damping, "lambda": self.penalty}


def solve(total: Moments, damping: Damping) -> Ridge:
    """Factorise once.

    Raises:
        ValueError: all rows are zero, or the matrix is singular because nothing or too little is added to it.
    """
    k = total.matrix.shape[1]
    gram = total.matrix @ total.matrix.T if total.dual else total.matrix
    mean = float(np.trace(gram)) / k
    if mean == 0:
        raise ValueError("all gradients are zero, so there is nothing to fit.")
    chosen = shrinkage(gram, total.rows, total.fourth, k) if damping == "auto" else float(damping)
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
        return Ridge(total.rows, chosen, penalty, (total.matrix, solved))
    return Ridge(total.rows, chosen, penalty, (torch.cholesky_inverse(lower).numpy(),))


def shrinkage(gram: Float64, rows: int, fourth: float, width: int) -> float:
    """The damping that makes (K + lambda I) / N the best estimate of the rows' second moments, without any label.

    K / N estimates E[phi phi^T] from N rows. Ledoit and Wolf ("A well-conditioned estimator for large-dimensional
    covariance matrices", 2004) mix it with the multiple mu I of the identity that has its mean eigenvalue; the share
    rho of mu I that minimises the expected squared error has the estimate b^2 / d^2, with d^2 = |K/N - mu I|^2 and
    b^2 = sum_i |phi_i phi_i^T - K/N|^2 / N^2. Up to scale, that mixture is K plus rho / (1 - rho) mean eigenvalues.

    Args:
        gram: K `[k, k]`, or Phi Phi^T `[N, N]`, which has the same trace and norm.
        rows: N.
        fourth: sum_i |phi_i|^4.
        width: k.

    Returns:
        rho / (1 - rho), within 1e-6 .. 1e3.
    """
    square = float((gram**2).sum()) / rows**2
    mean = float(np.trace(gram)) / rows / width
    distance = square - width * mean**2
    spread = max(0.0, (fourth / rows - square) / rows)
    if distance <= spread:
        return MOST
    return float(np.clip(spread / (distance - spread), LEAST, MOST))
