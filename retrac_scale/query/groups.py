"""Scores of groups of samples."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from retrac_scale.arrays import Bools, Float32, Float64, Int64
from retrac_scale.columns import Column, Texts, as_column, is_text
from retrac_scale.index.reader import IndexReader
from retrac_scale.index.scan import scores
from retrac_scale.query.source import Source, opened, readout
from retrac_scale.query.topk import Reduce


@dataclass(frozen=True, eq=False)
class Groups:
    """Some groups of each lane, best first, `[lane, k]` all.

    Attributes:
        labels: of the groups.
        scores: -inf for groups without samples.
        errors: of the scores; None for the largest of a group.
        shares: see `TopK`.
        share_errors: of the shares.
    """

    labels: npt.NDArray[Any]
    scores: Float64
    errors: Float64 | None
    shares: Float64
    share_errors: Float64

    def some(self, lanes: Any) -> Groups:
        """Those of some lanes, chosen as an array is."""
        errors = None if self.errors is None else self.errors[lanes]
        return Groups(self.labels[lanes], self.scores[lanes], errors, self.shares[lanes], self.share_errors[lanes])


def labels_of(group_by: str | npt.ArrayLike, index: IndexReader) -> tuple[npt.NDArray[Any], npt.NDArray[np.integer]]:
    """The groups' sorted labels, and of which label each sample is."""
    if isinstance(group_by, str):
        names = index.column_names
        if group_by not in names:
            raise ValueError(f"group_by={group_by!r} is no column of the index; it has {', '.join(names) or 'none'}.")
        return _coded(index.column(group_by))
    labels = group_by if isinstance(group_by, np.ndarray) and group_by.dtype.kind == "U" else as_column(group_by)
    if labels.shape != (index.shape[1],):
        raise ValueError(f"group_by= has shape {labels.shape}; give one label for each of {index.shape[1]} samples.")
    return _coded(Texts.of(labels) if is_text(labels) else labels)


def _coded(column: Column) -> tuple[npt.NDArray[Any], npt.NDArray[np.integer]]:
    return (column.values, column.codes) if isinstance(column, Texts) else np.unique(column, return_inverse=True)


def group_run(
    source: Source,
    run: list[int],
    masks: list[Bools | None],
    rows: Float32,
    common: tuple[Any, ...],
    codes: list[Int64],
) -> tuple[Float64, Int64]:
    """What a run of chunks adds up to by group, and counts `[q, g]`.

    Returns:
        `[4, lane, g]`: sums of scores (or the largest), of their squares, of what of them is above zero, and of the
        squares of that.
    """
    signs, excluded, left_out, reduce, groups = common
    index = opened(source)
    q = rows.shape[1]
    sums, counts = np.zeros((4, len(signs) * q, groups)), np.zeros((q, groups), np.int64)
    if reduce == "max":
        sums[0] = -np.inf
    for number, mask, code in zip(run, masks, codes, strict=True):
        chunk = index.chunk(int(number))
        counted = np.ones((q, len(code)), dtype=bool) if mask is None else np.tile(mask, (q, 1))
        if excluded is not None:
            counted &= chunk.samples[None] != excluded[:, None]
        for query, names in enumerate(left_out or ()):
            counted[query] &= ~np.isin(chunk.samples, names)
        values = readout(index, scores(chunk, rows))
        order = np.argsort(code, kind="stable")
        starts = np.flatnonzero(np.diff(code[order], prepend=-1))
        present = code[order][starts]
        counts[:, present] += np.add.reduceat(counted[:, order].astype(np.int64), starts, axis=1)
        for side, sign in enumerate(signs):
            part = slice(side * q, (side + 1) * q)
            lanes = np.where(counted, sign * values, 0.0)[:, order]
            raised = np.maximum(lanes, 0)
            every = [lanes, np.square(lanes), raised, np.square(raised)]
            if reduce == "max":
                largest = np.where(counted[:, order], lanes, -np.inf)
                best = np.maximum.reduceat(largest, starts, axis=1)
                sums[0, part, present] = np.maximum(sums[0, part, present], best.T)
                every[0] = np.zeros_like(lanes)
            sums[:, part, present] += np.add.reduceat(np.stack(every), starts, axis=2)
    return sums, counts


def merge_groups(parts: list[tuple[Float64, Int64]], reduce: Reduce) -> tuple[Float64, Int64]:
    """What several runs of chunks add up to."""
    sums, counts = parts[0]
    for more, count in parts[1:]:
        largest = np.maximum(sums[0], more[0]) if reduce == "max" else sums[0] + more[0]
        sums, counts = sums + more, counts + count
        sums[0] = largest
    return sums, counts


def with_errors(sums: Float64, many: Int64, reduce: Reduce) -> tuple[Float64, Float64 | None, Float64, Float64]:
    """Scores of groups, their shares, and standard errors of both, `[lane, g]` each; -inf for groups without samples.

    Errors are those that a bootstrap over members tends to: of a group's score, its members drawn anew with
    replacement; of a share, all samples drawn anew. A share is what of a group's scores is above zero, of all that is.

    Args:
        sums: from `group_run`.
        many: members that count, `[lane, g]`.
        reduce: how scores make one; a largest score has no such error.
    """
    total, squares, raised, raised_squares = sums
    members = np.maximum(many, 1)
    score, error = total, None
    if reduce != "max":
        error = np.sqrt(np.maximum(squares - total**2 / members, 0))
    if reduce == "mean":
        assert error is not None
        score, error = total / members, error / members
    whole = np.maximum(raised.sum(1, keepdims=True), np.finfo(np.float64).tiny)
    share = raised / whole
    spread = (1 - 2 * share) * raised_squares + share**2 * raised_squares.sum(1, keepdims=True)
    return np.where(many > 0, score, -np.inf), error, share, np.sqrt(np.maximum(spread, 0)) / whole
