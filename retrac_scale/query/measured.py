"""The answer to samples that are measured first, and the exact order of what is found."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from retrac_scale.index.reader import IndexReader
from retrac_scale.index.scan import Found
from retrac_scale.query.answer import answer_rows, filled, topk
from retrac_scale.query.copies import folded, threshold
from retrac_scale.query.question import NO_SAMPLES, Question
from retrac_scale.query.rerank import as_measured, exact_scores
from retrac_scale.query.scanning import Scan
from retrac_scale.query.together import answer_sketched
from retrac_scale.query.topk import TopK
from retrac_scale.query.views import best_of_views, check_views
from retrac_scale.query.where import which
from retrac_scale.sketching.plans import plans_for_queries
from retrac_scale.sketching.samples import Samples
from retrac_scale.store import SketchStore
from retrac_scale.task.views import VIEWS, Views

if TYPE_CHECKING:
    from distributed import Client


def answer_samples(
    index: IndexReader, store: SketchStore | None, queries: Samples, question: Question, client: Client | None
) -> TopK:
    """See `Index.query`; `store` is the one that the index was built from, None where it cannot be had."""
    if not isinstance(queries, Samples):
        if question.rerank is not None:
            raise ValueError(NO_SAMPLES)
        raise ValueError(
            f"queries must be a SketchStore or rs.Samples(dataset, task, checkpoints, timesteps), got {type(queries)}."
        )
    if isinstance(queries.dataset, Views):
        check_views(question)
    if question.rerank is not None:
        return _reranked(index, store, queries, question, client)
    sketched = _like(queries, store).sketch(like=_known(store))
    if isinstance(queries.dataset, Views):
        rows, whose = index.query_rows(sketched), queries.dataset.whose
        return best_of_views(answer_rows(index, rows, whose, question, client), len(VIEWS))
    return answer_sketched(index, sketched, question, client)


def _like(queries: Samples, store: SketchStore | None) -> Samples:
    """Queries that are measured as a store was."""
    return replace(queries, timesteps=plans_for_queries(queries.timesteps, _known(store)))


def _known(store: SketchStore | None) -> SketchStore:
    if store is None:
        raise ValueError("to sketch the queries, the store that the index was built from is needed.")
    return store


def _reranked(
    index: IndexReader, store: SketchStore | None, queries: Samples, question: Question, client: Client | None
) -> TopK:
    """The best by sketch, so many as are asked for, in the order of their exact scores."""
    assert question.rerank is not None
    assert question.train is not None
    store = _known(store)
    queries, train = _like(queries, store), as_measured(question.train, store)
    sketched = queries.sketch(like=store)
    rows = index.query_rows(sketched)
    scan = Scan(index, rows, sketched.ids, question, which(question.where, index), client)
    found = filled(scan.samples(max(question.rerank, question.k + 1)), question.k)
    candidates, meta, signs = np.unique(found.ids), index.meta, question.signs
    exact = exact_scores(
        queries, train, candidates, index.estimator, meta["checkpoints"], meta["fingerprint"], (sketched, store)
    )
    values = np.repeat(signs, len(exact))[:, None] * np.tile(exact, (len(signs), 1))
    values = np.take_along_axis(values, np.searchsorted(candidates, found.ids), 1)
    order = np.stack([np.lexsort((ids, -lane)) for ids, lane in zip(found.ids, values, strict=True)])
    ids, best = np.take_along_axis(found.ids, order, 1), np.take_along_axis(values, order, 1)
    every, ranks, copies = Found(best, ids, np.zeros((*best.shape, 0))), order + 1, None
    if (alike := threshold(question.duplicates, index.estimator)) is not None:
        every, places, copies = folded(index, lambda _: every, question.k + 1, alike)
        ranks = np.take_along_axis(ranks, places, 1)
    return topk(scan, every, ranks, copies=copies)
