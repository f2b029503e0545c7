"""One score taken apart: what each checkpoint and timestep contributes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from retrac_scale.arrays import Float32, Float64, Int64, Samples
from retrac_scale.estimators.fitting import rows_at
from retrac_scale.index.reader import IndexReader
from retrac_scale.store import SketchStore
from retrac_scale.store.part import measures_in

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ALL = slice(None)


@dataclass(frozen=True, eq=False)
class Explanation:
    """The parts of a score; letters: c checkpoint, t timestep of the training sample, s timestep of the query.

    Attributes:
        query_id: the query.
        id: the training sample.
        score: the index's score.
        contributions: `[c, t, s]`. Cross pairing: w_c <v(c,i,t), v(c,q,s)> over the number of pairs that are averaged;
            they add up to the score of the store's own rows, which the index's rounding (int8) changes by `score` -
            their sum. Matched: the products of the index's own rows, which add up to `score`; zeros where t is not s.
            Of a squared score they are parts of its root.
        checkpoints: names, `[c]`.
        timesteps: of the training sample, `[c, t]`; None when the store does not say.
        query_timesteps: `[c, s]`, likewise.
        measures: names of the functions whose timesteps stand side by side, one equal part of t and s after the other;
            None where there is one.
    """

    query_id: Any
    id: Any
    score: float
    contributions: Float64
    checkpoints: list[str]
    timesteps: Int64 | None
    query_timesteps: Int64 | None
    measures: list[str] | None = None

    def figure(self) -> Figure:
        """What each checkpoint (row) and query timestep (column) adds to the score; red raises it, blue lowers it."""
        from matplotlib.figure import Figure

        values = self.contributions.sum(1)
        figure = Figure(figsize=(2.5 + 0.35 * values.shape[1], 1.8 + 0.4 * values.shape[0]), layout="constrained")
        axes: Any = figure.subplots()
        limit = max(float(np.abs(values).max()), 1e-30)
        image = axes.imshow(values, cmap="RdBu_r", vmin=-limit, vmax=limit, aspect="auto")
        figure.colorbar(image, label="contribution")
        axes.set_yticks(range(len(values)), self.checkpoints, parse_math=False)
        steps = self.query_timesteps
        if steps is not None and (steps == steps[0]).all():
            axes.set_xticks(range(values.shape[1]), steps[0], rotation=90 if values.shape[1] > 8 else 0)
        axes.set_xlabel("timestep of the query" + (f": {', then '.join(self.measures)}" if self.measures else ""))
        title = f"query {self.query_id}, sample {self.id}: score {self.score:.4g}"
        axes.set_title(title, fontsize=10, parse_math=False)  # names may hold dollar signs
        return figure


def explain(index: IndexReader, query: SketchStore, id: Any) -> Explanation:
    """See `Index.explain`."""
    if query.shape[0] != 1:
        raise ValueError(f"explain one query at a time, got {query.shape[0]}; choose one with rs.take(queries, [id]).")
    return explain_lists(index, query, [[id]])[0][0]


def explain_lists(index: IndexReader, queries: SketchStore, lists: Sequence[Sequence[Any]]) -> list[list[Explanation]]:
    """The explanations of each query's results, every sample read once.

    Args:
        index: whose scores are taken apart.
        queries: `q` queries; their vectors of one checkpoint at a time are held.
        lists: ids of training samples, for each query.
    """
    matched = index.estimator.pairing == "matched"
    if index.estimator.damping is not None and not matched:
        raise ValueError(
            f"{index.meta['estimator']['kind']} has one ridge over the means of all timesteps, so that its scores "
            "cannot be taken apart; explain an index of ReTracRidge, TracIn, ReTrac, GradDot or GradCos."
        )
    store = index.check_store()
    if store is None:
        raise ValueError("an explanation needs the store that the index was built from, which was in memory.")
    rows = index.query_rows(queries).astype(np.float64)
    places = _places(index, list(dict.fromkeys(id for ids in lists for id in ids)))
    names = sorted(places, key=places.__getitem__)
    by_place = {places[id]: id for id in names}
    ascending = np.array([*by_place], np.int64)
    asking = {id: [query for query, ids in enumerate(lists) if id in ids] for id in names}
    measures = measures_in(index.meta)
    parts = None if matched else _contributions(index, store, queries, ascending, list(asking.values()))
    steps, query_steps = _timesteps(index, store, ascending), _timesteps(index, queries)
    found: dict[tuple[int, Any], Explanation] = {}

    def of(asked: Int64) -> Float32:
        return index.rows_at(np.array([by_place[place] for place in asked.tolist()]))

    for some, of_index in rows_at(store, ascending, of):
        for place, row in enumerate(of_index, some.start):
            own = row.astype(np.float64).reshape(rows[:, 0].shape)
            for query in asking[id := names[place]]:
                products = own * rows[:, query]
                score = float(products.sum())
                by_timestep = products.reshape(len(products), index.meta.get("slots", 1), -1).sum(2)
                found[query, id] = Explanation(
                    queries.ids[query],
                    id,
                    score**2 if index.estimator.squared else score,
                    parts[query, place] if parts else by_timestep[:, :, None] * np.eye(by_timestep.shape[1]),
                    index.checkpoints,
                    None if steps is None else steps[place],
                    None if query_steps is None else query_steps[query],
                    measures if len(measures) > 1 else None,
                )
    return [[found[query, id] for id in ids] for query, ids in enumerate(lists)]


def _contributions(
    index: IndexReader, store: SketchStore, queries: SketchStore, places: Int64, asking: Sequence[Sequence[int]]
) -> dict[tuple[int, int], Float64]:
    """Under cross pairing, of each query and each sample that it is about: w_c <v, v>, in the mean, `[c, t, s]`."""
    found: dict[tuple[int, int], list[Float64]] = {}
    for name, weight in index.meta["checkpoints"].items():
        asked = _vectors(index, queries, name)
        for some, vectors in rows_at(store, places, partial(_vectors, index, store, name)):
            for place, own in enumerate(vectors, some.start):
                for query in asking[place]:
                    products = weight * (own.astype(np.float64) @ asked[query].astype(np.float64).T)
                    found.setdefault((query, place), []).append(products / products.size)
    return {pair: np.stack(parts) for pair, parts in found.items()}


def _places(index: IndexReader, ids: list[Any]) -> dict[Any, int]:
    """Where some samples of an index stand in its store."""
    here, places = index.find(ids)
    if -1 in here:
        raise ValueError(f"there is no sample {ids[here.tolist().index(-1)]!r} in the index.")
    return dict(zip(ids, places.tolist(), strict=True))


def _vectors(index: IndexReader, side: SketchStore, checkpoint: str, samples: Samples = ALL) -> Float32:
    """What each pair of some samples contributes, `[n, t, k]`."""
    return index.estimator.stored_vectors(side, checkpoint, samples)


def _timesteps(index: IndexReader, side: SketchStore, samples: Samples = ALL) -> list[Int64] | None:
    """Of each of some samples, `[c, t]`; None when the store does not say."""
    if not side.has("timestep"):
        return None
    return list(np.stack([side.timesteps(name, samples) for name in index.checkpoints], axis=1))
