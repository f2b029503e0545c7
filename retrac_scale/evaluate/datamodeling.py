"""Linear datamodeling score: do scores predict retraining?"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from retrac_scale.evaluate.intervals import Interval, two_way
from retrac_scale.evaluate.spearman import Columns, correlation, pseudo_values

if TYPE_CHECKING:
    from retrac_scale.arrays import Bools, Float64


def lds(scores: npt.ArrayLike, members: npt.ArrayLike, losses: npt.ArrayLike) -> Float64:
    """Per query, Spearman's correlation over subsets of the sum of its members' scores with minus the query's loss.

    1 when the scores order the retrained models' losses perfectly: a larger score means that training on the sample
    lowers the query's loss, so a subset with a larger sum should leave a smaller loss. The field reports the mean over
    queries (Park et al. 2023, arXiv 2303.14186); `lds_mean` adds an interval. TRAK and quanda correlate with an output
    that grows as the model gets better (the margin, the log-probability of the target), D-TRAK negates the scores and
    correlates with the loss: all three have this sign.

    Args:
        scores: `[q, n]`, e.g. `Index.scores(queries)`.
        members: which samples belong to each of m subsets, bool `[m, n]`.
        losses: of each query under the model of each subset, `[m, q]`, from `retrain`.

    Returns:
        float64 `[q]`; NaN for a query whose losses or sums are all equal.

    Raises:
        ValueError: shapes do not fit, there are fewer than 2 subsets, or a score or loss is NaN or infinite.
    """
    sums, outcome = sums_and_outcomes(scores, members, losses)
    return correlation(Columns.of(sums), Columns.of(outcome))


def lds_mean(scores: npt.ArrayLike, members: npt.ArrayLike, losses: npt.ArrayLike, *, level: float = 0.95) -> Interval:
    """The mean of `lds` over queries that are not NaN, with an interval: other queries, and as many other subsets.

    All queries share the same few retrained models, so that an interval over queries alone would be too narrow. The
    interval is a jackknife over subsets, whose pseudo-values form a two-way layout with the queries (`two_way`).

    Args:
        scores: see `lds`.
        members: see `lds`.
        losses: see `lds`.
        level: of the interval.
    """
    a, b = map(Columns.of, sums_and_outcomes(scores, members, losses))
    values = correlation(a, b)
    known = np.isfinite(values)
    return two_way(float(np.nanmean(values)), np.nan_to_num(pseudo_values(a, b)[:, known]), level)


def sums_and_outcomes(scores: npt.ArrayLike, members: npt.ArrayLike, losses: npt.ArrayLike) -> tuple[Float64, Float64]:
    """Sums of scores and minus losses, `[m, q]` both; sums that differ by no more than their rounding are the same."""
    values, loss = np.asarray(scores, dtype=np.float64), np.asarray(losses, dtype=np.float64)
    inside: Bools = np.asarray(members, dtype=bool)
    if inside.ndim != 2 or loss.ndim != 2 or values.shape != (loss.shape[1], inside.shape[1]):
        raise ValueError(
            f"scores [q, n], members [m, n] and losses [m, q] do not fit together: {values.shape}, {inside.shape}, "
            f"{loss.shape}."
        )
    if len(inside) != len(loss) or len(inside) < 2:
        raise ValueError(f"there are {len(inside)} subsets and losses of {len(loss)}; give at least 2 of both.")
    for name, given in (("scores", values), ("losses", loss)):
        wrong = np.argwhere(~np.isfinite(given))
        if len(wrong):
            raise ValueError(f"{name} hold NaN or inf, first at {tuple(wrong[0].tolist())}; leave such samples out.")
    sums = inside.astype(np.float64) @ values.T
    unit = np.abs(values).sum(1) * 2.0 ** (np.ceil(np.log2(inside.shape[1])) - 50)
    return np.round(sums / np.where(unit > 0, unit, 1)), -loss
