"""The answer to a question: scanned, put in exact order where that is asked for, with its uncertainty."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from retrac_scale.arrays import Bools, Float32, Float64, Int64
from retrac_scale.index.reader import IndexReader
from retrac_scale.index.scan import Found
from retrac_scale.query.copies import OF_GROUPS, copies_of_queries, folded, threshold
from retrac_scale.query.groups import Groups
from retrac_scale.query.question import Question
from retrac_scale.query.scanning import Scan
from retrac_scale.query.topk import Side, TopK
from retrac_scale.query.views import best_of_views
from retrac_scale.query.where import which

if TYPE_CHECKING:
    from distributed import Client

RESOLVED = 2.0
"""Standard errors of the difference between neighbours above which their order counts as resolved."""


def answer_rows(
    index: IndexReader, rows: Float32, query_ids: npt.NDArray[Any], question: Question, client: Client | None = None
) -> TopK:
    """The answer to queries whose rows `[c, q, k]` are known already, without reranking."""
    scan = Scan(index, rows, query_ids, question, which(question.where, index), client)
    found, groups, copies = _found(scan)
    return topk(scan, found, groups=groups, copies=copies)


def answers_by_one_scan(
    index: IndexReader, rows: Sequence[Float32], query_ids: npt.NDArray[Any], questions: Sequence[Question]
) -> list[TopK | ValueError]:
    """The answer to each of some queries, or why there is none, as if each had been asked alone.

    Args:
        index: what is asked.
        rows: of each query, `[c, v, k]`: one, or those of all its views, whose best is the answer.
        query_ids: `[q]`.
        questions: `[q]`, which differ in nothing but `k`, or `where`, a mask or None; groups not in `where` either.
    """
    given = {id(one.where): one.where for one in questions}
    mask: Bools | None = None
    if given.keys() != {id(None)}:
        masks = [np.ones(index.shape[1], bool) if one is None else np.asarray(one) for one in given.values()]
        mask = masks[0] if len(masks) == 1 else np.stack(masks)
    whose = np.repeat(np.arange(len(questions)), [own.shape[1] for own in rows])
    of = None if len(given) == 1 else np.array([[*given].index(id(one.where)) for one in questions])[whose]
    every = replace(questions[0], k=max(one.k for one in questions))
    scan = Scan(index, np.concatenate(rows, axis=1), query_ids[whose], every, mask, None, of)
    found, groups, copies = _found(scan)

    def own(query: int) -> TopK | ValueError:
        alone = whose == query
        lanes, views = np.tile(alone, len(every.signs)), int(alone.sum())
        asked = replace(scan, query_ids=scan.query_ids[alone], question=questions[query])
        of_groups, of_copies = groups and groups.some(lanes), None if copies is None else copies[lanes]
        try:
            answer = topk(asked, found.some(lanes), groups=of_groups, copies=of_copies)
        except ValueError as error:
            return error
        return answer if views == 1 else best_of_views(answer, views)

    return [own(query) for query in range(len(questions))]


def _found(scan: Scan) -> tuple[Found, Groups | None, npt.NDArray[Any] | None]:
    """What answers a question, by lane; its groups, where it is about them, or copies, where they are folded."""
    question = scan.question
    alike = threshold(question.duplicates, scan.index.estimator)
    if question.group_by is not None:
        groups = scan.groups(question.group_by, copies_left_out(scan))
        return Found(groups.scores, groups.labels, np.zeros((*groups.scores.shape, 0))), groups, None
    if alike is None:
        return scan.samples(question.k + 1), None, None
    best, _, copies = folded(scan.index, scan.samples, question.k + 1, alike)
    return best, None, copies


def copies_left_out(scan: Scan) -> list[npt.NDArray[Any]] | None:
    """The samples that groups do not count, for each query; None where copies are kept."""
    alike = threshold(scan.question.duplicates, scan.index.estimator)
    if alike is None:
        return None
    side: Side = "proponents" if scan.index.estimator.squared else "both"
    found = replace(scan, question=replace(scan.question, side=side)).samples(OF_GROUPS)
    return copies_of_queries(scan.index, found, len(scan.query_ids), alike)


def filled(found: Found, k: int) -> Found:
    """Only the places that every lane has a sample for; ValueError when that would cut a lane short of its best k."""
    counts = (found.scores > -np.inf).sum(1)
    width = int(counts.min())
    if width < min(k, int(counts.max())):
        raise ValueError(
            f"k = {k} is more than every query has: with exclude_self= or duplicates= some have only {width} left; ask "
            f"for at most {width}, or widen where=."
            if width
            else "where= and exclude_self= leave some queries no sample to score; widen where=."
        )
    return Found(found.scores[:, :width], found.ids[:, :width], found.parts[:, :width])


def topk(
    scan: Scan,
    found: Found,
    ranks: Int64 | None = None,
    groups: Groups | None = None,
    copies: npt.NDArray[Any] | None = None,
) -> TopK:
    """The answer, lanes of both sides side by side; `found` may hold more than k places."""
    question, q, k = scan.question, len(scan.query_ids), scan.question.k
    found = filled(found, k)
    if not found.scores.shape[1]:
        raise ValueError("where= and exclude_self= leave no sample to score.")
    errors, resolved = _uncertainty(found, k, scan.index.estimator.squared, scan.index.functions)
    errors = errors if groups is None else groups.errors
    width = min(k, found.scores.shape[1])

    def beside(values: npt.NDArray[Any]) -> npt.NDArray[Any]:
        return np.concatenate(np.split(values[:, :width], len(values) // q), axis=1)

    signs = np.repeat(question.signs, q)[:, None]
    return TopK(
        beside(found.ids),
        beside(signs * found.scores),
        scan.query_ids,
        question.side,
        scan.index.meta["estimator"],
        errors=None if errors is None else beside(errors),
        resolved=None if resolved is None else beside(resolved),
        sketch_rank=None if ranks is None else beside(ranks),
        shares=None if groups is None else beside(groups.shares),
        share_errors=None if groups is None else beside(groups.share_errors),
        copies=None if copies is None else beside(copies),
    )


def _uncertainty(found: Found, k: int, squared: bool, functions: int) -> tuple[Float64 | None, Bools | None]:
    """Standard errors, and whether each score stands clear of the next one; None where there is one measurement.

    A score is a sum of T measurements, so that its variance is estimated by T / (T - 1) times the sum of the squares of
    their deviations from their mean. That of a difference by those of the differences is a matter of luck where T is
    small, and small by luck is what looks resolved: half of it is the mean over the list's k differences (an empirical
    Bayes estimate in the manner of Smyth 2004). Several functions of the same forward pass are one measurement.
    """
    t = found.parts.shape[2] // functions
    if t < 2:
        return None, None
    parts = found.parts.reshape(*found.scores.shape, functions, t).sum(2)
    parts = parts * (2 * parts.sum(2, keepdims=True) if squared else 1)  # a square, to first order

    def variance(values: Float64) -> Float64:
        found: Float64 = t / (t - 1) * np.square(values - values.mean(2, keepdims=True)).sum(2)
        return found

    resolved = np.ones(found.scores.shape, dtype=bool)  # nothing stands behind the last one
    if found.scores.shape[1] > 1:
        own = variance(parts[:, :-1] - parts[:, 1:])
        gap = found.scores[:, :-1] - found.scores[:, 1:]
        resolved[:, :-1] = gap > RESOLVED * np.sqrt((own + own[:, :k].mean(1, keepdims=True)) / 2)
    return np.sqrt(variance(parts)), resolved
