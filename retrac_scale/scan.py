"""One chunk of an index: score it against all queries and keep the best k."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from retrac_scale.store.encoding import Float32

TILE_ROWS = 1024

Best = tuple[npt.NDArray[np.float64], npt.NDArray[np.int64]]
"""scores [q, k] and sample positions [q, k], best first; unfilled places hold -inf and -1."""


def scores(rows: npt.NDArray[Any], scale: Float32, queries: Float32) -> npt.NDArray[np.float64]:
    """sum_c scale[c,n] <rows[c,n], queries[c,q]>, `[q, n]`.

    Products are float32 for int8 and float16 rows and float64 for float32 rows; checkpoints add up in float64.
    """
    precision = np.float64 if rows.dtype == np.float32 else np.float32
    out = np.zeros((queries.shape[1], rows.shape[1]))
    for c in range(len(rows)):
        query = queries[c].astype(precision, copy=False)
        for start in range(0, rows.shape[1], TILE_ROWS):
            tile = slice(start, start + TILE_ROWS)
            out[:, tile] += (query @ rows[c, tile].astype(precision).T) * scale[c, tile].astype(np.float64)
    return out


def best(values: npt.NDArray[np.float64], positions: npt.NDArray[np.int64], ids: npt.NDArray[Any], k: int) -> Best:
    """The k largest values of each query, ties broken by the smaller id.

    Args:
        values: `[q, m]`; -inf marks places that do not count.
        positions: sample positions `[q, m]`.
        ids: all sample ids `[n]`.
        k: how many to keep.
    """
    q = len(values)
    kept_values, kept_positions = np.full((q, k), -np.inf), np.full((q, k), -1, dtype=np.int64)
    for row in range(q):
        candidates = np.flatnonzero(values[row] > -np.inf)
        if len(candidates) > k:
            threshold = np.partition(values[row, candidates], -k)[-k]
            candidates = candidates[values[row, candidates] >= threshold]
        order = np.lexsort((ids[positions[row, candidates]], -values[row, candidates]))[:k]
        chosen = candidates[order]
        kept_values[row, : len(chosen)] = values[row, chosen]
        kept_positions[row, : len(chosen)] = positions[row, chosen]
    return kept_values, kept_positions
