"""Do scores predict the losses of models that were trained on random subsets? (linear datamodeling score)"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from retrac_scale.evaluate.datamodeling import sums_and_outcomes
from retrac_scale.evaluate.intervals import Interval, jackknife, two_way
from retrac_scale.evaluate.judging.base import Draws, Figure, Truth
from retrac_scale.evaluate.spearman import Columns, correlation, pseudo_values

if TYPE_CHECKING:
    from retrac_scale.arrays import Bools, Float64


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

        Intervals are of other queries and as many other subsets, see `lds_mean`. A query whose sums of scores are all
        the same counts as 0: the method says nothing of it.
        """
        for kind, rows in self.rows.items():
            told = scores[rows] * (np.ptp(scores[rows], axis=1, keepdims=True) > 0)  # equal ones tell a subset's size
            a, b = map(Columns.of, sums_and_outcomes(told, self.members, self.losses[:, rows]))
            values, table = np.nan_to_num(correlation(a, b)), np.nan_to_num(pseudo_values(a, b))
            value = two_way(values.mean(), table, draws.level)
            yield Figure(kind, self.kinds[kind], "LDS", value, self.ceiling(kind, draws.level))

    def ceiling(self, kind: str, level: float = 0.95) -> Interval | None:
        """What a method reaches that knows the mean loss of each subset over all seeds; None without further seeds.

        A loss is such a mean plus the luck of its seed. By classical test theory the correlation of the mean with one
        measurement is the root of their reliability (Lord and Novick 1968, chapter 3): the covariance over subsets of
        losses under two seeds, of which chance has no part, divided by the variance over subsets under one. The former
        is taken from the r subsets that were trained again, the latter from all m; both are unbiased for few subsets,
        which Spearman's correlation is not. The mean over pairs of seeds and queries is taken before the root, which
        makes it an upper bound. The interval is by jackknife, over subsets and over queries, their variances added.

        All m models share one seed: a method that knows what this seed does may pass the ceiling.

        Args:
            kind: of query.
            level: of the interval.
        """
        s, r, _ = self.again.shape
        if s < 1 or r < 3:
            return None
        rows = self.rows[kind]
        shared = np.concatenate([self.losses[None, :r, rows], self.again[:, :, rows]]).transpose(1, 2, 0)  # [r, q, s]
        spread = self.losses[:, rows].var(0, ddof=1)
        by_subset = jackknife(lambda some: _index_of_reliability(some, spread), shared, level=level)
        by_query = jackknife(
            lambda some, of: _index_of_reliability(some.transpose(1, 0, 2), of),
            shared.transpose(1, 0, 2),
            spread,
            level=level,
        )
        value, reach = by_subset.value, np.hypot(by_subset.high - by_subset.value, by_query.high - by_query.value)
        return Interval(value, max(0.0, value - float(reach)), min(1.0, value + float(reach)))

    @property
    def sentence(self) -> str:
        """See `Truth`."""
        m, (s, r, _) = len(self.members), self.again.shape
        more = f", {r} of them with {s} more seeds" if s else ""
        return f"{m} models trained on random subsets{more}"

    def _of_queries(self, rows: Any) -> dict[str, Any]:
        return {"losses": self.losses[:, rows], "again": self.again[:, :, rows]}

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


def _index_of_reliability(shared: Float64, spread: Float64) -> float:
    """Of losses under several seeds, `[r, q, s]`, and their variance over subsets under one, `[q]`."""
    centred = shared - shared.mean(0)
    pairs = [(centred[..., a] * centred[..., b]).sum(0) for a, b in combinations(range(shared.shape[2]), 2)]
    reliability = np.mean(pairs, axis=0) / (len(shared) - 1) / spread
    return float(np.sqrt(np.clip(reliability.mean(), 0, 1)))
