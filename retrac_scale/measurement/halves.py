"""An index with matched pairing, asked by some of its measurements alone: do two such runs give the same lists?"""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from retrac_scale.arrays import Float32, Float64
from retrac_scale.evaluate.intervals import Interval, percentiles
from retrac_scale.query.answer import answer_rows
from retrac_scale.query.question import Question
from retrac_scale.query.source import all_scores_of
from retrac_scale.store import SketchStore
from retrac_scale.store.taking import take

if TYPE_CHECKING:
    from distributed import Client

    from retrac_scale.index.reader import IndexReader

SIZES, SPLITS = 3, 6
"""Runs of so many sizes are compared, a half of the measurements, a quarter, ..., in so many pairs of each."""
QUERIES = 64
"""Training samples that are asked where no queries are given."""
ASKED_BYTES = 64 * 2**20
"""Of queries that are asked at a time."""
CORRELATED = 16_384
"""Samples, about, over which scores are correlated."""
RESAMPLES = 400
USUAL_SLOPE = 0.6
"""Of the log odds of the overlap against the log of the number of measurements, where two sizes are not at hand."""
SLOPES = (0.3, 1.2)
NEVER = 10**6

Places = tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Repeatability:
    """How far two honest runs of one kind would agree, told from parts of the measurements of one.

    Attributes:
        k: length of the lists.
        measurements: of a sample, T: timesteps, draws or visits; or checkpoints, where each was measured once.
        overlaps: {m: shares of the top-k lists that two runs of m measurements have in common, `[splits, q]`}.
        correlations: Spearman's rank correlation of two halves' scores over the samples, `[splits, q]`.
    """

    k: int
    measurements: int
    overlaps: dict[int, Float64]
    correlations: Float64

    @property
    def half(self) -> int:
        """Measurements of a half."""
        return self.measurements // 2

    @property
    def halves(self) -> Interval:
        """Overlap of the top-k lists of two halves, the mean over queries and splits."""
        return self._interval(lambda some: _at(some, self.half))

    @property
    def overlap(self) -> Interval:
        """The overlap foretold for two whole runs."""
        return self.foretold(self.measurements)

    @property
    def rank_correlation(self) -> Interval:
        """The rank correlation foretold for the scores of two whole runs, from that of halves by Spearman and Brown."""
        longer = self.measurements / self.half

        def whole(values: Float64) -> float:
            r = float(values.mean())
            return longer * r / (1 + (longer - 1) * r) if r > 0 else r

        rng = np.random.default_rng(0)
        values = self.correlations
        drawn = [np.ix_(*(rng.integers(0, count, count) for count in values.shape)) for _ in range(RESAMPLES)]
        return percentiles(whole(values), [whole(values[some]) for some in drawn])

    @property
    def by_query(self) -> Float64:
        """The overlap of two halves' lists for each query, `[q]`."""
        mean: Float64 = self.overlaps[self.half].mean(0)
        return mean

    def foretold(self, measurements: int) -> Interval:
        """The overlap of two runs of so many measurements.

        The log odds of the overlap are taken to rise with the log of the number of measurements, as they do for
        reliabilities by Spearman and Brown's formula with slope 1; offset and slope are fitted to the sizes at hand.
        """
        return self._interval(lambda some: _odds_to_share(_curve(some, math.log(measurements))))

    def needed(self, overlap: float) -> int:
        """The least number of measurements whose lists are foretold to agree so far; at most `NEVER`."""
        if not 0 < overlap < 1:
            raise ValueError(f"an overlap to reach lies between 0 and 1, got {overlap!r}.")
        offset, slope = _line(self.overlaps)
        exponent = (math.log(overlap / (1 - overlap)) - offset) / slope
        return max(1, math.ceil(math.exp(exponent) - 1e-9)) if exponent < math.log(NEVER) else NEVER

    def _interval(self, statistic: Any) -> Interval:
        """With an interval over queries and splits at once."""
        rng = np.random.default_rng(0)
        resampled = []
        for _ in range(RESAMPLES):
            queries = rng.integers(0, self.correlations.shape[1], self.correlations.shape[1])
            some = {m: x[np.ix_(rng.integers(0, len(x), len(x)), queries)] for m, x in self.overlaps.items()}
            resampled.append(statistic(some))
        return percentiles(statistic(self.overlaps), resampled)

    def __str__(self) -> str:
        share, order = self.overlap, self.rank_correlation
        return (
            f"of the top {self.k}, {self.k * share.value:.1f} ({self.k * share.low:.1f} to {self.k * share.high:.1f}) "
            f"would come again in another run of {self.measurements} measurements; two halves share "
            f"{self.k * self.halves.value:.1f}; rank correlation {order.value:.2f}"
        )


class MeasuredOnceError(ValueError):
    """One measurement of a sample does not tell how far another would agree."""


def repeatability_of_index(
    index: IndexReader, queries: SketchStore | None, k: int = 10, *, client: Client | None = None
) -> Repeatability:
    """See `repeatability`, of an index with matched pairing, whose rows hold every timestep's part.

    Raises:
        MeasuredOnceError: there is one timestep.
        ValueError: the index has cross pairing, or is gone from its store.
    """
    if index.estimator.pairing != "matched":
        raise ValueError("an index with cross pairing holds means over timesteps; give the store and its estimator.")
    own = queries is None
    if queries is None:
        store = index.check_store()
        if store is None:
            raise ValueError("give queries: the store that the index was built from was in memory.")
        queries = take(store, some_ids(store))
    return repeatability_of_rows(index, index.query_rows(queries), queries.ids, k, exclude_self=own, client=client)


def repeatability_of_rows(
    index: IndexReader,
    rows: Float32,
    query_ids: npt.NDArray[Any],
    k: int = 10,
    *,
    exclude_self: bool = False,
    where: npt.ArrayLike | str | None = None,
    client: Client | None = None,
) -> Repeatability:
    """As `repeatability_of_index`, of queries whose rows `[c, q, k]` are known already.

    Lists hold only samples that `where` leaves, and are shorter than k where those are fewer.
    """
    functions = index.functions  # of the same forward passes, whose luck they share
    t = int(index.meta.get("slots", 1)) // functions
    pairs = pairs_of_parts(t)
    k = list_length(k, index.shape[1] - exclude_self)
    question = Question(k, "proponents", where, None, "sum", exclude_self)
    q = rows.shape[1]
    chosen = sorted({part for some in pairs.values() for pair in some for part in pair})
    group = max(1, ASKED_BYTES // rows.nbytes)
    lists: dict[Places, npt.NDArray[Any]] = {}
    for some in (chosen[start : start + group] for start in range(0, len(chosen), group)):
        asked = np.concatenate([_alone(rows, part, functions, t) for part in some], axis=1)
        ids = answer_rows(index, asked, np.tile(query_ids, len(some)), question, client).ids
        lists |= dict(zip(some, ids.reshape(len(some), q, -1), strict=True))
    overlaps = {m: np.stack([shared(lists[one], lists[other]) for one, other in some]) for m, some in pairs.items()}
    scores = (
        tuple(all_scores_of(index, _alone(rows, part, functions, t), CORRELATED) for part in pair)
        for pair in pairs[t // 2]
    )
    length = lists[chosen[0]].shape[1]
    return Repeatability(length, t, overlaps, np.stack([correlation(*pair) for pair in scores]))


def _alone(rows: Float32, part: Places, functions: int, t: int) -> Float32:
    """Rows `[c, q, k]` with zeros in place of all measurements but some."""
    c, q, _ = rows.shape
    alone = np.zeros_like(rows)
    alone.reshape(c, q, functions, t, -1)[:, :, :, part] = rows.reshape(c, q, functions, t, -1)[:, :, :, part]
    return alone


def list_length(k: int, others: int) -> int:
    """Length of the lists that are compared: k, or half of what there is to list, since longer ones agree anyway.

    Raises:
        ValueError: there are fewer than two samples to list.
    """
    if others < 2:
        raise ValueError("fewer than two samples are left to list, which cannot tell how far two lists would agree.")
    return min(k, others // 2)


def pairs_of_parts(t: int) -> dict[int, list[tuple[Places, Places]]]:
    """Pairs of disjoint parts of t measurements, by their size: a half, a quarter, ...; the same at every call.

    Raises:
        MeasuredOnceError: t is 1.
    """
    if t < 2:
        raise MeasuredOnceError(
            "every sample was measured once, which cannot tell how far another measurement would agree; add timesteps "
            "with sketch(..., grow=True) or until=."
        )
    rng = np.random.default_rng(0)
    found: dict[int, list[tuple[Places, Places]]] = {}
    m = t // 2
    while m and len(found) < SIZES:
        if math.comb(t, m) <= 2 * SPLITS or t <= 4:
            parts = list(itertools.combinations(range(t), m))
            every = [(one, other) for one, other in itertools.combinations(parts, 2) if not set(one) & set(other)]
            found[m] = [every[place] for place in sorted(rng.permutation(len(every))[:SPLITS].tolist())]
        else:
            orders = [rng.permutation(t) for _ in range(SPLITS)]
            found[m] = [
                (tuple(sorted(order[:m].tolist())), tuple(sorted(order[m : 2 * m].tolist()))) for order in orders
            ]
        m //= 2
    return found


def some_ids(store: SketchStore) -> npt.NDArray[Any]:
    """Ids of a few training samples, from all over the store."""
    alive = np.flatnonzero(store.alive)
    return store.ids[alive[:: max(1, len(alive) // QUERIES)][:QUERIES]]


def shared(one: npt.NDArray[Any], other: npt.NDArray[Any]) -> Float64:
    """What share of two lists `[q, k]` is in both, for each query, `[q]`."""
    share: Float64 = np.array([len(np.intersect1d(a, b)) for a, b in zip(one, other, strict=True)]) / one.shape[1]
    return share


def correlation(one: Float64, other: Float64) -> Float64:
    """Spearman's correlation of scores `[q, n]`, `[q]`."""
    from scipy.stats import rankdata

    ranks = [rankdata(values, axis=1) - (values.shape[1] + 1) / 2 for values in (one, other)]
    lengths = [np.sqrt(np.square(rank).sum(1)) for rank in ranks]
    found: Float64 = (ranks[0] * ranks[1]).sum(1) / np.maximum(lengths[0] * lengths[1], 1e-300)
    return found


def warn_of_own_noise(index: IndexReader) -> None:
    """Warn where samples that are compared at the same timestep were measured under different noise."""
    plans: Sequence[dict[str, Any]] = index.meta["noise"]
    if not any(plan.get("kind") in ("EvenlySpaced", "Explicit") and plan.get("noise") != "common" for plan in plans):
        return
    try:
        told = f": {repeatability_of_index(index, None)}"
    except MeasuredOnceError:
        told = ", and measured once, so that nothing tells how much of a score is luck"
    except ValueError as error:  # too few samples
        told = f"; {str(error).removesuffix('.')}"
    warnings.warn(
        f"matched pairing compares gradients at the same timestep, but every sample has noise of its own there{told}. "
        "Sketch with EvenlySpaced(4), whose noise is common.",
        stacklevel=3,
    )


def _at(overlaps: dict[int, Float64], m: int) -> float:
    return float(overlaps[m].mean())


def _line(overlaps: dict[int, Float64]) -> tuple[float, float]:
    """Offset and slope of the log odds of the overlap against log m."""
    sizes = sorted(overlaps)
    odds = []
    for m in sizes:
        places = overlaps[m].size * 10  # no overlap is known to be 0 or 1
        share = np.clip(_at(overlaps, m), 0.5 / places, 1 - 0.5 / places)
        odds.append(math.log(share / (1 - share)))
    logs = [math.log(m) for m in sizes]
    slope = USUAL_SLOPE
    if len(sizes) > 1:
        slope = float(np.clip(np.polyfit(logs, odds, 1)[0], *SLOPES))
    return odds[-1] - slope * logs[-1], slope


def _curve(overlaps: dict[int, Float64], log_m: float) -> float:
    offset, slope = _line(overlaps)
    return offset + slope * log_m


def _odds_to_share(log_odds: float) -> float:
    return 1 / (1 + math.exp(-log_odds))
