"""The answers to all views of a query, as one."""

from __future__ import annotations

import numpy as np

from retrac_scale.query.question import Question
from retrac_scale.query.topk import TopK


def check_views(question: Question) -> None:
    """Raise ValueError where what is asked cannot be had of views."""
    asked = {
        "group_by": question.group_by is not None,
        "rerank": question.rerank is not None,
        "together": question.together,
        "duplicates": question.duplicates != "keep",
    }
    if given := [name for name, is_asked in asked.items() if is_asked]:
        raise ValueError(f"a query in views is answered with the best of its lists, without {given[0]}=; leave it out.")


def best_of_views(every: TopK, views: int) -> TopK:
    """One list for each query, in which a sample has its largest score (of opponents, its smallest) in any view.

    A sample among the k best by its best view is among the k best of that view, so that nothing is lost.

    Args:
        every: the lists of all views, those of a query one after the other, `[q views, k]`.
        views: how many there are of each.
    """
    queries = len(every.query_ids) // views
    found = []
    for side, places in every.sides.items():
        sign = -1 if side == "opponents" else 1
        ids, scores = (values[:, places].reshape(queries, -1) for values in (every.ids, every.scores))
        k = ids.shape[1] // views
        best = np.empty((queries, k), np.int64)
        for query in range(queries):
            order = np.lexsort((ids[query], -sign * scores[query]))
            first = np.unique(ids[query, order], return_index=True)[1]
            best[query] = order[np.sort(first)[:k]]
        found.append([np.take_along_axis(values, best, 1) for values in (ids, scores)])
    ids, scores = (np.concatenate(values, 1) for values in zip(*found, strict=True))
    return TopK(ids, scores, every.query_ids[::views], every.side, every.estimator)
