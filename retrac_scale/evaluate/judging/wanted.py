"""Are the samples found that a query is known to come from?"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from retrac_scale.evaluate.intervals import Interval, bootstrap
from retrac_scale.evaluate.judging import ranking
from retrac_scale.evaluate.judging.base import Draws, Figure, Truth

if TYPE_CHECKING:
    from retrac_scale.arrays import Float64

METRICS: dict[str, Callable[[Any], Float64]] = {
    "first": ranking.first,
    "in top 10": lambda found: ranking.every_part(found, 10),
    "MRR": ranking.reciprocal_rank,
    "precision@10": lambda found: ranking.precision(found, 10),
    "recall at count": ranking.recall_at_count,
}
"""By name: `[q, n]` as `ranking.ranked` gives it -> `[q]`; "in top 10" asks for one sample of each part."""


@dataclass(frozen=True, eq=False)
class Wanted(Truth):
    """Which training samples each query should find.

    Attributes:
        parts: int8 `[q, n]`: 0 is not looked for; 1, 2, ... is the part of the query that the sample stands for. A
            query without any is left out.
        metrics: names of `METRICS`.
    """

    parts: Any
    metrics: tuple[str, ...]

    what: ClassVar[str] = "wanted"

    def figures(self, scores: Float64, draws: Draws) -> Iterator[Figure]:
        """Each metric of each kind of query, intervals over queries; the ceiling is what the best order reaches."""
        for kind, rows in self.rows.items():
            asked = self.parts[rows].any(1)
            if not asked.any():
                continue
            wanted = self.parts[rows][asked]
            found, best = ranking.ranked(scores[rows][asked], wanted), ranking.ranked(wanted > 0, wanted)
            for metric in self.metrics:
                value = bootstrap(
                    np.mean, METRICS[metric](found), draws=draws.count, level=draws.level, seed=draws.seed
                )
                top = float(METRICS[metric](best).mean())
                ceiling = None if metric == "in top 10" or top == 1 else Interval(top, top, top)
                yield Figure(kind, int(asked.sum()), metric, value, ceiling)

    @property
    def sentence(self) -> str:
        """See `Truth`."""
        counts = (self.parts > 0).sum(1)
        counts = counts[counts > 0]
        each = f"{counts.min()}" if counts.min() == counts.max() else f"{counts.min()} to {counts.max()}"
        return f"{each} of {self.samples} training samples to be found for each query"

    def _of_queries(self, rows: Any) -> dict[str, Any]:
        return {"parts": self.parts[rows]}

    def _arrays(self) -> dict[str, Any]:
        return {"parts": self.parts, "metrics": np.array(self.metrics)}

    @classmethod
    def _of(cls, common: dict[str, Any], arrays: Mapping[str, Any]) -> Wanted:
        return cls(**common, parts=arrays["parts"], metrics=tuple(arrays["metrics"].tolist()))
