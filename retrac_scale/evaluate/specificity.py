"""Specificity: do different queries get different answers?"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.stats import spearmanr


def unique_fraction(ids: npt.NDArray[Any]) -> float:
    """Distinct ids in the union of M top-k lists, divided by M k; 1 when no two lists share a sample.

    It falls as M grows, so compare methods on the same queries. quanda calls it top-k cardinality.

    Args:
        ids: `[q, k]`, e.g. `TopK.ids`.

    >>> unique_fraction(np.array([[1, 2], [1, 3]]))
    0.75
    """
    return len(np.unique(ids)) / ids.size


def largest_share(ids: npt.NDArray[Any]) -> float:
    """The share of the M top-k lists in which the most frequent sample stands.

    Args:
        ids: `[q, k]`, e.g. `TopK.ids`.

    >>> largest_share(np.array([[1, 2], [1, 3]]))
    1.0
    """
    return float(_counts(ids).max() / len(ids))


def hubs(ids: npt.NDArray[Any], share: float = 0.2) -> int:
    """Hubness: how many samples stand in at least this share of the M top-k lists ("generally influential" ones).

    Args:
        ids: `[q, k]`, e.g. `TopK.ids`; no list names a sample twice.
        share: between 0 and 1.

    Raises:
        ValueError: the share is not in (0, 1].
    """
    if not 0 < share <= 1:
        raise ValueError(f"share is a part of the lists, above 0 and up to 1, got {share}.")
    return int((_counts(ids) / len(ids) >= share).sum())


def norm_correlation(scores: npt.ArrayLike, norms: npt.ArrayLike) -> float:
    """Spearman's rank correlation over samples of the score, averaged over queries, with the gradient norm.

    Near 1 or -1, a sample's place in the lists is decided by the norm of its gradient, whatever the query.

    Args:
        scores: `[q, n]`, e.g. `Index.scores(queries)`.
        norms: `[n]`, e.g. `SketchStore.norms(checkpoint).mean(1)`, weighted over checkpoints where there are several.
    """
    return float(spearmanr(np.asarray(scores).mean(0), np.asarray(norms)).statistic)


def _counts(ids: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
    """In how many lists each sample stands."""
    counts: npt.NDArray[np.int64] = np.unique(ids, return_counts=True)[1]
    return counts
