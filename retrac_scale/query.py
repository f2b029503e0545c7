"""All chunks of an index: scan, merge in a tree, filter; the answer is a TopK."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import dask
import numpy as np
import numpy.typing as npt
import pandas as pd

from retrac_scale.index import Index, Side, compute, open_index
from retrac_scale.scan import Best, best, scores
from retrac_scale.store import SketchStore
from retrac_scale.store.encoding import Float32
from retrac_scale.store.schema import Url

if TYPE_CHECKING:
    from distributed import Client

MERGE_WIDTH = 16


@dataclass(frozen=True)
class TopK:
    """The best training samples of each query, best first.

    Scores are sums over checkpoints of w_c times an inner product, in the estimator's units: squared loss gradient for
    TracIn, cosines for ReTrac. A positive score means that training on the sample lowered the query's loss (proponent),
    a negative one that it raised it (opponent).

    Attributes:
        ids: `[q, k]` sample ids.
        scores: float64 `[q, k]`.
        query_ids: `[q]`.
        side: "proponents" or "opponents".
        estimator: JSON description of the estimator.
    """

    ids: npt.NDArray[Any]
    scores: npt.NDArray[np.float64]
    query_ids: npt.NDArray[Any]
    side: Side
    estimator: dict[str, Any] = field(default_factory=dict)

    def to_frame(self) -> pd.DataFrame:
        """A pandas table with columns query, rank (from 1), id, score."""
        q, k = self.ids.shape
        return pd.DataFrame(
            {
                "query": np.repeat(self.query_ids, k),
                "rank": np.tile(np.arange(1, k + 1), q),
                "id": self.ids.ravel(),
                "score": self.scores.ravel(),
            }
        )

    def to_json(self) -> str:
        """JSON with the estimator, the side, and per query its ids and scores."""
        rows = zip(self.query_ids.tolist(), self.ids.tolist(), self.scores.tolist(), strict=True)
        return json.dumps(
            {
                "estimator": self.estimator,
                "side": self.side,
                "results": [{"query": q, "ids": ids, "scores": values} for q, ids, values in rows],
            }
        )

    def report(
        self, path: str | os.PathLike[str], images: npt.ArrayLike, query_images: npt.ArrayLike, *, ids: npt.ArrayLike
    ) -> Path:
        """Write a self-contained HTML page with each query beside its results.

        Args:
            path: the file to write.
            images: training images `[n, h, w]` or `[n, h, w, 3]`, 0 .. 255 or 0 .. 1.
            query_images: likewise `[q, ...]`.
            ids: sample ids of `images`, `[n]`.
        """
        from retrac_scale.report import Pictures, write_report  # at call time: the street runs from query to report

        pictures = Pictures(np.asarray(images), np.asarray(ids), np.asarray(query_images))
        return write_report(path, {str(self.estimator.get("kind", "score")): self}, pictures)


def run_query(
    index: Index, queries: SketchStore, k: int, *, side: Side, where: npt.ArrayLike | None, client: Client | None
) -> TopK:
    """See `Index.query`."""
    if side not in get_args(Side):
        raise ValueError(f"side must be one of {get_args(Side)}, got {side!r}.")
    if k < 1:
        raise ValueError(f"k must be 1 or more, got {k}.")
    if client is not None and index.url is None:
        raise ValueError("workers cannot reach an index in this process's memory; build it at a path or URL.")
    ids = index.ids
    mask = None if where is None else _mask(where, ids)
    sign = 1 if side == "proponents" else -1
    rows = np.float32(sign) * index.query_rows(queries)
    k = min(k, len(ids) if mask is None else int(mask.sum()))
    source, shared = (index, rows) if client is None else (index.url, client.scatter(rows, broadcast=True))
    scan, merge = dask.delayed(_scan_chunk), dask.delayed(_merge)
    level = [
        scan(source, samples, shared, None if mask is None else mask[samples], ids[samples], k)
        for samples in index.chunks
        if mask is None or mask[samples].any()
    ]
    while len(level) > 1:
        level = [merge(level[i : i + MERGE_WIDTH], k) for i in range(0, len(level), MERGE_WIDTH)]
    if not level:
        raise ValueError("where= leaves no sample to score.")
    (values, found), *_ = compute(level, client)
    return TopK(found, sign * values, queries.ids, side, index.meta["estimator"])


def _mask(where: npt.ArrayLike, ids: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
    chosen = np.asarray(where)
    if chosen.dtype == bool:
        if chosen.shape != ids.shape:
            raise ValueError(f"where= is a mask of shape {chosen.shape}; the index has {len(ids)} samples.")
        return chosen
    unknown = ~np.isin(chosen, ids)
    if unknown.any():
        raise ValueError(f"where= names the id {chosen[unknown].tolist()[0]!r}, which is not in the index.")
    return np.isin(ids, chosen)


Found = tuple[npt.NDArray[np.float64], npt.NDArray[Any]]
"""scores [q, k] and ids [q, k]."""


def _scan_chunk(
    source: Index | Url,
    samples: slice,
    queries: Float32,
    mask: npt.NDArray[np.bool_] | None,
    ids: npt.NDArray[Any],
    k: int,
) -> Found:
    index = source if isinstance(source, Index) else open_index(source)
    values = scores(*index.chunk(samples), queries)
    if mask is not None:
        values[:, ~mask] = -np.inf
    positions = np.broadcast_to(np.arange(values.shape[1]), values.shape)
    available = values.shape[1] if mask is None else int(mask.sum())
    return _named(best(values, positions, ids, min(k, available)), ids)


def _merge(parts: list[Found], k: int) -> Found:
    values = np.concatenate([part[0] for part in parts], axis=1)
    found = np.concatenate([part[1] for part in parts], axis=1)
    q, m = values.shape
    positions = np.arange(q * m).reshape(q, m)
    return _named(best(values, positions, found.ravel(), min(k, m)), found.ravel())


def _named(result: Best, ids: npt.NDArray[Any]) -> Found:
    values, positions = result
    return values, ids[positions]
