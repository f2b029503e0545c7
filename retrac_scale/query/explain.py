"""One score taken apart: what each checkpoint and timestep contributes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from retrac_scale.arrays import Float32, Int64
from retrac_scale.index.reader import IndexReader
from retrac_scale.store import SketchStore

if TYPE_CHECKING:
    from matplotlib.figure import Figure


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
    """

    query_id: Any
    id: Any
    score: float
    contributions: npt.NDArray[np.float64]
    checkpoints: list[str]
    timesteps: Int64 | None
    query_timesteps: Int64 | None

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
        axes.set_xlabel("timestep of the query")
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
    wanted: dict[Any, list[int]] = {}
    for query, ids in enumerate(lists):
        for id in ids:
            wanted.setdefault(id, []).append(query)
    places, positions = _places(index, list(wanted))
    parts: dict[tuple[int, Any], list[npt.NDArray[np.float64]]] = {}
    for name, weight in () if matched else index.meta["checkpoints"].items():
        asked = _vectors(index, queries, name, slice(None))
        for id, its_queries in wanted.items():
            own = _vectors(index, store, name, slice(positions[id], positions[id] + 1))[0].astype(np.float64)
            for query in its_queries:
                products = weight * (own @ asked[query].astype(np.float64).T)
                parts.setdefault((query, id), []).append(products / products.size)
    steps = {id: _timesteps(index, store, positions[id]) for id in wanted}
    query_steps = [_timesteps(index, queries, query) for query in range(len(lists))]

    def one(query: int, id: Any) -> Explanation:
        number = next(i for i, samples in enumerate(index.chunks) if places[id] < samples.stop)
        chunk = index.chunk(number)
        row = chunk.row(places[id] - index.chunks[number].start)
        products = np.stack(
            [
                float(scale[row]) * (stored[row].astype(np.float64) * asked[query])
                for scale, stored, asked in zip(chunk.scale, chunk.rows, rows, strict=True)
            ]
        )
        score = float(products.sum())
        if matched:
            by_timestep = products.reshape(len(products), index.meta["slots"], -1).sum(2)
            contributions = by_timestep[:, :, None] * np.eye(index.meta["slots"])
        else:
            contributions = np.stack(parts[query, id])
        score = score**2 if index.estimator.squared else score
        name = queries.ids[query]
        return Explanation(name, id, score, contributions, index.checkpoints, steps[id], query_steps[query])

    return [[one(query, id) for id in ids] for query, ids in enumerate(lists)]


def _places(index: IndexReader, ids: list[Any]) -> Iterator[dict[Any, int]]:
    """Where some samples stand in an index, and in its store."""
    found = index.find(ids)
    if -1 in found[0]:
        raise ValueError(f"there is no sample {ids[found[0].tolist().index(-1)]!r} in the index.")
    return (dict(zip(ids, places.tolist(), strict=True)) for places in found)


def _vectors(index: IndexReader, side: SketchStore, checkpoint: str, samples: slice) -> Float32:
    """What each pair of some samples contributes, `[n, t, k]`."""
    return index.estimator.stored_vectors(side, checkpoint, samples)


def _timesteps(index: IndexReader, side: SketchStore, place: int) -> Int64 | None:
    if not side.has("timestep"):
        return None
    return np.concatenate([side.timesteps(name, slice(place, place + 1)) for name in index.checkpoints])
