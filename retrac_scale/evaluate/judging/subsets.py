"""Do scores predict the losses of models that were trained on random subsets? (linear datamodeling score)"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from retrac_scale.evaluate.datamodeling import sums_and_outcomes
from retrac_scale.evaluate.intervals import Interval, percentiles
from retrac_scale.evaluate.judging.base import Draws, Figure, Truth
from retrac_scale.evaluate.spearman import Columns, correlation, resamples

if TYPE_CHECKING:
    from retrac_scale.scan import Bools
    from retrac_scale.store.encoding import Float64


@dataclass(frozen=True, eq=False)
class Subsets(Truth):
    """Losses of every query under models trained on random subsets.

    Attributes:
        members: which samples each of m models was trained on, bool `[m, n]`.
        losses: of each query under each model, float64 `[m, q]`.
        again: the same of the first r models, trained again with s more seeds, `[s, r, q]`; s may be 0.
    """

    members: Bools
    losses: Float64
    again: Float64

    what: ClassVar[str] = "subsets"

    def figures(self, scores: Float64, draws: Draws) -> Iterator[Figure]:
        """The LDS of each kind of query, beside its ceiling.

        Intervals resample queries and subsets at once. A query whose sums of scores are all the same counts as 0: the
        method says nothing of it.
        """
        for kind, rows in self.rows.items():
            told = scores[rows] * (np.ptp(scores[rows], axis=1, keepdims=True) > 0)  # equal ones add up to rounding
            both = sums_and_outcomes(told, self.members, self.losses[:, rows])
            value = _bootstrapped(_correlations, both, draws)
            yield Figure(kind, self.kinds[kind], "LDS", value, self.ceiling(kind, draws))

    def ceiling(self, kind: str, draws: Draws | None = None) -> Interval | None:
        """The LDS of a method that knows the mean loss of each subset over all seeds; None without further seeds.

        A loss is such a mean plus the luck of its seed, so by classical test theory the correlation of the mean with
        one measurement is the root of the correlation r of two measurements with different seeds (the index of
        reliability; Spearman 1904; Lord and Novick 1968, section 3.4). r is Spearman's, over the subsets that were
        trained again, averaged over pairs of seeds and over queries; the root of a mean is at least the mean of roots,
        so this is an upper bound. All m models share one seed: a method that knows what this seed does may pass it.
        """
        draws = Draws() if draws is None else draws
        if not len(self.again):
            return None
        rows = self.rows[kind]
        seeds = np.concatenate([self.losses[None, : self.again.shape[1], rows], self.again[:, :, rows]])
        return _bootstrapped(_agreements, tuple(seeds), draws, lambda r: float(np.sqrt(max(0.0, r))))

    @property
    def sentence(self) -> str:
        """See `Truth`."""
        m, (s, r, _) = len(self.members), self.again.shape
        more = f", {r} of them with {s} more seeds" if s else ""
        return f"{m} models trained on random subsets{more}"

    def _arrays(self) -> dict[str, Any]:
        return {
            "members": np.packbits(self.members, axis=1),
            "losses": self.losses.astype(np.float32),
            "again": self.again.astype(np.float32),
        }

    @classmethod
    def _of(cls, common: dict[str, Any], arrays: Mapping[str, Any]) -> Subsets:
        members = np.unpackbits(arrays["members"], axis=1, count=common["samples"]).astype(bool)
        return cls(
            **common,
            members=members,
            losses=arrays["losses"].astype(np.float64),
            again=arrays["again"].astype(np.float64),
        )


def _correlations(columns: list[Columns], counts: Any = None) -> Float64:
    """Of sums with outcomes, `[q]`."""
    return np.nan_to_num(correlation(columns[0], columns[1], counts))


def _agreements(seeds: list[Columns], counts: Any = None) -> Float64:
    """Mean over pairs of seeds, `[q]`."""
    pairs = [_correlations([a, b], counts) for a, b in combinations(seeds, 2)]
    mean: Float64 = np.mean(pairs, axis=0)
    return mean


def _bootstrapped(
    each: Callable[..., Float64], arrays: tuple[Float64, ...], draws: Draws, then: Callable[[float], float] = float
) -> Interval:
    """`then` of the mean over queries of `each`, over resamples of rows and columns of all arrays `[m, q]` together."""
    columns = [Columns.of(array) for array in arrays]
    m, q = arrays[0].shape
    drawn = resamples(m, q, draws.count, draws.seed)
    values = [then(each(columns, counts)[chosen].mean()) for counts, chosen in drawn]
    return percentiles(then(each(columns).mean()), values, draws.level)
