"""An index as a task is given it, and the scores of its chunks."""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from retrac_scale.arrays import Bools, Float32, Float64, Int64
from retrac_scale.index.chunk import Chunk
from retrac_scale.index.reader import IndexReader, StaleIndexError, complete_root
from retrac_scale.index.scan import scores
from retrac_scale.runtime.graphs import delayed
from retrac_scale.store import SketchStore
from retrac_scale.store.schema import whereabouts

if TYPE_CHECKING:
    import dask.array

Source = IndexReader | tuple[str, str]
"""An index: here as it is, for workers its URL and description."""


def for_workers(index: IndexReader) -> tuple[str, str]:
    """What a worker opens the index by."""
    return whereabouts(index.url), json.dumps(index.meta, sort_keys=True)


def opened(source: Source) -> IndexReader:
    """The index of a source."""
    return source if isinstance(source, IndexReader) else _open_on_worker(*source)


@functools.lru_cache(maxsize=4)
def _open_on_worker(url: str, meta: str) -> IndexReader:
    """The index at a URL, kept open in this process while its description is the same: its maps outlive a task."""
    index = IndexReader(complete_root(url), url)
    if for_workers(index)[1] != meta:  # of another, the chunks' numbers and the deletions are others
        raise StaleIndexError(f"the index {url} was built again after it was opened; open it anew.")
    return index


def chunks_of(
    index: IndexReader, run: list[int], masks: list[Bools | None], of: Int64 | None = None
) -> Iterator[Chunk]:
    """Some chunks, each with its mask of the samples that count, see `Chunk`."""
    for number, mask in zip(run, masks, strict=True):
        yield index.chunk(int(number)).filtered(mask, of)


def readout(index: IndexReader, values: Float64) -> Float64:
    """Scores as the estimator tells them, of inner products."""
    return np.square(values) if index.estimator.squared else values


def all_scores(index: IndexReader, queries: SketchStore) -> dask.array.Array:
    """See `Index.scores`."""
    import dask
    import dask.array  # and with it pandas and SciPy: 60 MB that a query has no use for

    index.check_store()
    rows = index.query_rows(queries)
    source = for_workers(index) if isinstance(index.url, str | os.PathLike) else index
    one, shared = delayed(_chunk_scores), dask.delayed(rows)
    parts = [
        dask.array.from_delayed(one(source, number, shared), (rows.shape[1], part.stop - part.start), np.float64)
        for number, part in enumerate(index.chunks)
    ]
    return dask.array.concatenate(parts, axis=1)


def all_scores_of(index: IndexReader, rows: Float32, samples: int) -> Float64:
    """Scores of queries by their rows `[c, q, k]` for about so many samples, `[q, n]`, of chunks from all over."""
    wanted = max(1, samples * len(index.chunks) // index.shape[1])
    numbers = range(0, len(index.chunks), max(1, len(index.chunks) // wanted))
    return np.concatenate([readout(index, scores(index.chunk(number), rows)) for number in numbers], axis=1)


def _chunk_scores(source: Source, number: int, rows: Float32) -> Float64:
    index = opened(source)
    (chunk,) = chunks_of(index, [number], [None])
    return readout(index, scores(chunk, rows))
