"""Where the samples that are looked for stand in lists by falling score."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from retrac_scale.arrays import Float64


def ranked(scores: npt.ArrayLike, worth: npt.ArrayLike) -> Any:
    """The worth of each query's samples, those with the largest score first, `[q, n]`.

    Among equal scores the least worth comes first: a method that cannot tell samples apart gains nothing by order.

    Args:
        scores: `[q, n]`.
        worth: `[q, n]`, say 1 for samples that are looked for.
    """
    values = np.asarray(worth)
    order = np.lexsort((values, -np.asarray(scores, dtype=np.float64)), axis=-1)
    return np.take_along_axis(values, order, axis=-1)


def first(found: Any) -> Float64:
    """1 where the first of a list is looked for, float64 `[q]`; lists as `ranked` gives them."""
    return np.asarray(found[:, 0] > 0, dtype=np.float64)


def reciprocal_rank(found: Any) -> Float64:
    """One over the place, from 1 on, of the first sample that is looked for, 0 without one; its mean is the MRR."""
    hit = found > 0
    return np.where(hit.any(1), 1 / (1 + hit.argmax(1)), 0.0)


def precision(found: Any, k: int) -> Float64:
    """The share of the first k that is looked for."""
    share: Float64 = (found[:, :k] > 0).mean(1)
    return share


def recall_at_count(found: Any) -> Float64:
    """The share of the c samples that are looked for among the first c (R-precision)."""
    hit = found > 0
    count = hit.sum(1)
    inside = hit & (np.arange(found.shape[1]) < count[:, None])
    share: Float64 = inside.sum(1) / count
    return share


def every_part(found: Any, k: int) -> Float64:
    """1 where the first k hold a sample of each part: worth says which, 1, 2, ..., and 0 is none."""
    return np.array([float(set(row[row > 0]) <= set(row[:k])) for row in found])


def ndcg(gains: Any, k: int) -> Float64:
    """Normalised discounted cumulative gain of the first k, float64 `[q]` (Järvelin and Kekäläinen 2002).

    sum_i gain_i / log2(i + 1) over places i = 1 .. k, divided by the same for gains in falling order; NaN where no gain
    is above zero. Negative gains count as 0.

    Args:
        gains: as `ranked` gives them, `[q, g]`.
        k: length of the lists.
    """
    held = np.clip(np.asarray(gains, dtype=np.float64), 0, None)
    best = -np.sort(-held, axis=1)
    weight = 1 / np.log2(np.arange(2, min(k, held.shape[1]) + 2))
    with np.errstate(invalid="ignore"):
        ratio: Float64 = (held[:, :k] @ weight) / (best[:, :k] @ weight)
    return ratio
