"""A whole set of queries as one question, read some at a time."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from retrac_scale.arrays import Float64
from retrac_scale.index.reader import IndexReader
from retrac_scale.index.scan import Found
from retrac_scale.query.answer import answer_rows, copies_left_out, topk
from retrac_scale.query.question import Question
from retrac_scale.query.scanning import Scan, best_groups
from retrac_scale.query.topk import TopK
from retrac_scale.query.where import which
from retrac_scale.store import SketchStore

if TYPE_CHECKING:
    from distributed import Client

AT_ONCE = 64
"""Queries whose rows are held."""


def answer_sketched(index: IndexReader, queries: SketchStore, question: Question, client: Client | None) -> TopK:
    """The answer to queries as they are sketched, one by one or together, without reranking."""
    if question.together:
        return answer_together(index, queries, question, client)
    return answer_rows(index, index.query_rows(queries), queries.ids, question, client)


def answer_together(index: IndexReader, queries: SketchStore, question: Question, client: Client | None) -> TopK:
    """One list for all queries: means over them, see `Index.query`.

    Raises:
        ValueError: the mean of the scores of samples has no meaning, or is not to be had.
    """
    index.check_queries(queries)
    ids = queries.ids
    name = np.array([f"{len(ids)} queries"])
    blocks = [slice(start, min(start + AT_ONCE, len(ids))) for start in range(0, len(ids), AT_ONCE)]
    if question.group_by is None:
        if index.estimator.squared or question.exclude_self:
            what = "squared scores" if index.estimator.squared else "exclude_self="
            raise ValueError(
                f"together= asks with the mean of the queries, which {what} cannot be had of; use group_by=."
            )
        total = np.zeros((index.shape[0], 1, index.shape[2]))
        for some in blocks:
            total += index.rows_of(queries, some).sum(1, keepdims=True, dtype=np.float64)
        rows = (total / len(ids)).astype(np.float32)
        return answer_rows(index, rows, name, replace(question, together=False), client)
    mask = which(question.where, index)
    sums: Any = 0.0
    for some in blocks:
        scan = Scan(index, index.rows_of(queries, some), ids[some], question, mask, client)
        labels, scores, _, shares, _ = scan.all_groups(question.group_by, copies_left_out(scan))
        values = np.stack([np.where(np.isfinite(scores), scores, 0), shares, ~np.isfinite(scores)])
        lanes = values.reshape(3, len(question.signs), -1, len(labels))
        sums = sums + np.stack([lanes.sum(2), np.square(lanes).sum(2)])
    mean = sums[0] / len(ids)
    error = _errors(sums, len(ids))
    missing = mean[2] == 1
    groups = best_groups(labels, np.where(missing, -np.inf, mean[0]), error[0], mean[1], error[1], question.k)
    scan = Scan(index, np.zeros((1, 1, 1), np.float32), name, question, mask, client)
    return topk(scan, Found(groups.scores, groups.labels, np.zeros((*groups.scores.shape, 0))), groups=groups)


def _errors(sums: Any, count: int) -> Float64:
    """Standard errors of means over queries, of sums and sums of squares `[2, ...]`; 0 of one query."""
    total, squares = sums
    spread: Float64 = np.sqrt(np.maximum(squares - np.square(total) / count, 0) / max(count - 1, 1) / count)
    return spread
