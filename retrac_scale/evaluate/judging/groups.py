"""Which group of samples does a query miss most when it is left out?"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import permutations
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from retrac_scale.evaluate.intervals import Interval, bootstrap
from retrac_scale.evaluate.judging import ranking
from retrac_scale.evaluate.judging.base import Draws, Figure, Truth

if TYPE_CHECKING:
    from retrac_scale.arrays import Float64

DEPTH = 3
"""Of NDCG."""


@dataclass(frozen=True, eq=False)
class Groups(Truth):
    """Losses of every query under models that were trained without one group, several seeds each.

    Attributes:
        labels: {column: `[n]`}: the group of each sample in each way to group them.
        names: {column: `[g]`}: the groups, in the order of `without`.
        without: {column: float64 `[s, g, q]`}: loss without the group, under each seed.
        whole: loss of the model that saw all samples, float64 `[s, q]`.
    """

    labels: Mapping[str, Any]
    names: Mapping[str, Any]
    without: Mapping[str, Float64]
    whole: Float64

    what: ClassVar[str] = "groups"

    def harm(self, column: str) -> Float64:
        """How much each query's loss rises without each group, under each seed, `[s, q, g]`."""
        harm: Float64 = (self.without[column] - self.whole[:, None]).transpose(0, 2, 1)
        return harm

    def figures(self, scores: Float64, draws: Draws) -> Iterator[Figure]:
        """For each way to group samples: is the group with the largest summed score the one whose removal hurts most.

        "first": whether it is; "NDCG@3": of groups by summed score, the gain being the rise of the loss, mean over
        seeds. The ceiling is what the rise under one seed scores when it is judged by that under another, None of one
        seed: a method that knows the mean over seeds can pass it.
        """
        for column, labels in self.labels.items():
            inside = np.asarray(labels)[None] == np.asarray(self.names[column])[:, None]  # [g, n]
            sums, harm = scores @ inside.T.astype(np.float64), self.harm(column)
            for kind, rows in self.rows.items():
                for metric, values in _metrics(sums[rows], harm[:, rows].mean(0)).items():
                    others = [_metrics(a[rows], b[rows])[metric] for a, b in permutations(harm, 2)]
                    ceiling = _interval(np.mean(others, axis=0), draws) if others else None
                    value, name = _interval(values, draws), f"{metric} of {len(inside)}, {column}"
                    if value is not None:
                        yield Figure(kind, len(_defined(values)), name, value, ceiling)

    @property
    def sentence(self) -> str:
        """See `Truth`."""
        groups = " and ".join(f"{len(names)} by {column}" for column, names in self.names.items())
        return f"models trained without one group, {groups}, {len(self.whole)} seeds each"

    def _of_queries(self, rows: Any) -> dict[str, Any]:
        without = {column: losses[:, :, rows] for column, losses in self.without.items()}
        return {"without": without, "whole": self.whole[:, rows]}

    def _arrays(self) -> dict[str, Any]:
        found: dict[str, Any] = {"columns": np.array(list(self.labels)), "whole": self.whole.astype(np.float32)}
        for column, labels in self.labels.items():
            found[f"labels/{column}"] = np.asarray(labels).astype(np.str_)
            found[f"names/{column}"] = np.asarray(self.names[column]).astype(np.str_)
            found[f"without/{column}"] = self.without[column].astype(np.float32)
        return found

    @classmethod
    def _of(cls, common: dict[str, Any], arrays: Mapping[str, Any]) -> Groups:
        labels, names, without = (
            {column: arrays[f"{part}/{column}"] for column in arrays["columns"].tolist()}
            for part in ("labels", "names", "without")
        )
        without = {column: values.astype(np.float64) for column, values in without.items()}
        return cls(**common, labels=labels, names=names, without=without, whole=arrays["whole"].astype(np.float64))


def _metrics(sums: Float64, harm: Float64) -> dict[str, Float64]:
    """By name, `[q]`, of summed scores and harm, `[q, g]` both."""
    most = np.arange(harm.shape[1]) == harm.argmax(1)[:, None]
    return {
        "first": ranking.first(ranking.ranked(sums, most)),
        f"NDCG@{DEPTH}": ranking.ndcg(ranking.ranked(sums, harm), DEPTH),
    }


def _defined(values: Float64) -> Float64:
    """Of those queries that some removal harms; for the others there is no NDCG."""
    return values[np.isfinite(values)]


def _interval(values: Float64, draws: Draws) -> Interval | None:
    """Of the mean over queries for which the metric is defined; None without any."""
    known = _defined(values)
    return bootstrap(np.mean, known, draws=draws.count, level=draws.level, seed=draws.seed) if len(known) else None
