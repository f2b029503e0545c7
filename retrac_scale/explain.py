"""One score taken apart: what each checkpoint and timestep contributes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from retrac_scale.index import Index
from retrac_scale.store import SketchStore

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Explanation:
    """The parts of a score; letters: c checkpoint, t timestep of the training sample, s timestep of the query.

    Attributes:
        query_id: the query.
        id: the training sample.
        score: the index's score.
        contributions: w_c <v(c,i,t), v(c,q,s)> over the number of pairs that are averaged, `[c, t, s]`; they add up to
            the score of the store's own rows, which the index's rounding (int8) changes by `score` - their sum. Matched
            pairing leaves zeros where t is not s.
        checkpoints: names, `[c]`.
        timesteps: of the training sample, `[c, t]`; None when the store does not say.
        query_timesteps: `[c, s]`, likewise.
    """

    query_id: Any
    id: Any
    score: float
    contributions: npt.NDArray[np.float64]
    checkpoints: list[str]
    timesteps: Ints | None
    query_timesteps: Ints | None

    def figure(self) -> Figure:
        """A picture: contributions by checkpoint and query timestep, summed over the sample's own timesteps."""
        from retrac_scale.report.explanation import explanation_figure  # at call time: the street ends in the report

        return explanation_figure(self)


def explain(index: Index, query: SketchStore, id: Any) -> Explanation:
    """See `Index.explain`."""
    if index.estimator.damping is not None:
        raise ValueError(
            f"{index.meta['estimator']['kind']} mixes the timesteps of all samples, so that its scores cannot be taken "
            "apart; explain an index of TracIn, ReTrac, GradDot or GradCos."
        )
    store = index.check_store()
    if store is None:
        raise ValueError("an explanation needs the store that the index was built from, which was in memory.")
    if query.shape[0] != 1:
        raise ValueError(f"explain one query at a time, got {query.shape[0]}; choose one with rs.take(queries, [id]).")
    rows = index.query_rows(query)
    found = np.flatnonzero(index.ids == id)
    if not len(found):
        raise ValueError(f"there is no sample {id!r} in the index.")
    estimator, place = index.estimator, int(found[0])
    number = next(i for i, samples in enumerate(index.chunks) if place < samples.stop)
    chunk, row = index.chunk(number), place - index.chunks[number].start
    score = sum(
        float(chunk.scale[c, row]) * float(chunk.rows[c][row].astype(np.float64) @ rows[c, 0].astype(np.float64))
        for c in range(len(rows))
    )
    here = slice(position := int(np.flatnonzero(store.ids == id)[0]), position + 1)
    parts = []
    for name, weight in index.meta["checkpoints"].items():
        left, right = (
            estimator.vectors(side.sketches(name, samples), side.norms(name, samples))[0].astype(np.float64)
            for side, samples in ((store, here), (query, slice(0, 1)))
        )
        products = weight * (left @ right.T)
        parts.append(np.diag(np.diag(products)) if estimator.pairing == "matched" else products / products.size)
    steps, asked = (
        np.concatenate([side.timesteps(name, samples) for name in index.checkpoints]) if side.has("timestep") else None
        for side, samples in ((store, here), (query, slice(0, 1)))
    )
    return Explanation(query.ids[0], id, score, np.stack(parts), index.checkpoints, steps, asked)
