"""Agreement of two answers: fidelity to exact scores, stability across seeds."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from scipy.stats import spearmanr

if TYPE_CHECKING:
    from retrac_scale.arrays import Float64


def recall_at(scores: npt.ArrayLike, exact: npt.ArrayLike, k: int = 10) -> Float64:
    """Fidelity: the share of the exact top k that the scores' top k holds, for each query, float64 `[q]`.

    Args:
        scores: of the method under test, `[q, n]`.
        exact: of the reference, e.g. the same estimator on full gradients, `[q, n]`.
        k: length of the lists.
    """
    found, true = (np.argsort(-np.asarray(values), axis=1, kind="stable")[:, :k] for values in (scores, exact))
    return np.array([np.isin(a, b).mean() for a, b in zip(found, true, strict=True)])


def rank_correlation(scores: npt.ArrayLike, exact: npt.ArrayLike) -> Float64:
    """Fidelity: Spearman's correlation over samples of two methods' scores, for each query, float64 `[q]`.

    Args:
        scores: `[q, n]`.
        exact: `[q, n]`.
    """
    pairs = zip(np.asarray(scores), np.asarray(exact), strict=True)
    return np.array([spearmanr(a, b).statistic for a, b in pairs])


def stability(lists: Sequence[npt.NDArray[Any]]) -> Float64:
    """Jaccard index of top-k lists, averaged over all pairs of runs, for each query, float64 `[q]`; 1: always the same.

    Args:
        lists: `TopK.ids`, `[q, k]`, of runs that differ in a seed (projection, noise, training) or a timestep grid.

    Raises:
        ValueError: there are fewer than two runs.
    """
    if len(lists) < 2:
        raise ValueError(f"stability compares two runs or more, got {len(lists)}.")
    pairs = [[_jaccard(x, y) for x, y in zip(a, b, strict=True)] for a, b in combinations(lists, 2)]
    mean: Float64 = np.mean(pairs, axis=0)
    return mean


def _jaccard(a: npt.NDArray[Any], b: npt.NDArray[Any]) -> float:
    return len(np.intersect1d(a, b)) / len(np.union1d(a, b))
