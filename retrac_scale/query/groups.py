"""Scores of groups of samples."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from retrac_scale.arrays import Bools, Float32, Float64, Int64
from retrac_scale.columns import Texts
from retrac_scale.index.reader import IndexReader
from retrac_scale.index.scan import scores
from retrac_scale.query.source import Source, chunks_of, opened, readout
from retrac_scale.query.topk import Reduce


def labels_of(group_by: str | npt.ArrayLike, index: IndexReader) -> tuple[npt.NDArray[Any], npt.NDArray[np.integer]]:
    """The groups' sorted labels, and of which label each sample is."""
    if isinstance(group_by, str):
        names = index.column_names
        if group_by not in names:
            raise ValueError(f"group_by={group_by!r} is no column of the index; it has {', '.join(names) or 'none'}.")
        column = index.column(group_by)
        return (column.values, column.codes) if isinstance(column, Texts) else np.unique(column, return_inverse=True)
    labels = np.asarray(group_by)
    if labels.shape != (index.shape[1],):
        raise ValueError(f"group_by= has shape {labels.shape}; give one label for each of {index.shape[1]} samples.")
    return np.unique(labels, return_inverse=True)


def group_run(
    source: Source,
    run: list[int],
    masks: list[Bools | None],
    rows: Float32,
    common: tuple[Any, ...],
    codes: list[Int64],
) -> tuple[Float64, Int64]:
    """Totals `[lane, g]` and counts `[q, g]` of a run of chunks."""
    signs, excluded, reduce, groups = common
    index = opened(source)
    q = rows.shape[1]
    combine: Any = np.maximum if reduce == "max" else np.add
    neutral = -np.inf if reduce == "max" else 0.0
    totals, counts = np.full((len(signs) * q, groups), neutral), np.zeros((q, groups), np.int64)
    for chunk, code in zip(chunks_of(index, run, masks), codes, strict=True):
        counted = np.ones((q, len(code)), dtype=bool) if chunk.mask is None else np.tile(chunk.mask, (q, 1))
        if excluded is not None:
            counted &= chunk.ids[None] != excluded[:, None]
        values = readout(index, scores(chunk, rows))
        order = np.argsort(code, kind="stable")
        starts = np.flatnonzero(np.diff(code[order], prepend=-1))
        present = code[order][starts]
        counts[:, present] += np.add.reduceat(counted[:, order].astype(np.int64), starts, axis=1)
        for side, sign in enumerate(signs):
            lanes = np.where(counted, sign * values, neutral)[:, order]
            part = slice(side * q, (side + 1) * q)
            totals[part, present] = combine(totals[part, present], combine.reduceat(lanes, starts, axis=1))
    return totals, counts


def merge_groups(parts: list[tuple[Float64, Int64]], reduce: Reduce) -> tuple[Float64, Int64]:
    """Totals and counts of several runs of chunks."""
    totals, counts = parts[0]
    for total, count in parts[1:]:
        totals = np.maximum(totals, total) if reduce == "max" else totals + total
        counts = counts + count
    return totals, counts
