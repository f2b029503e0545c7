"""All chunks of an index: scan, merge in a tree, filter, group; the answer is a TopK."""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from numbers import Integral
from typing import TYPE_CHECKING, Any, get_args

import dask
import numpy as np
import numpy.typing as npt
import torch

from retrac_scale.arrays import Bools, Float32, Float64
from retrac_scale.columns import Texts
from retrac_scale.index.reader import IndexReader, open_on_worker
from retrac_scale.index.scan import Chunk, Found, merge, scores, top
from retrac_scale.query.rerank import as_measured, exact_scores
from retrac_scale.query.topk import Reduce, Side, TopK
from retrac_scale.query.where import which
from retrac_scale.runtime.graphs import compute, constant, delayed
from retrac_scale.runtime.workers import worker_threads
from retrac_scale.sketching.plans import plans_for_queries
from retrac_scale.sketching.samples import Samples
from retrac_scale.store import SketchStore
from retrac_scale.store.schema import whereabouts

if TYPE_CHECKING:
    import dask.array
    from distributed import Client

MERGE_WIDTH = 16
RUN_CHUNKS = 64
GROUP_CHUNKS = 16
Source = IndexReader | tuple[str, str]
"""An index: here as it is, for workers its URL and description."""

RESOLVED = 2.0
"""Standard errors of the difference between neighbours above which their order counts as resolved."""


@dataclass(frozen=True, eq=False)
class Question:
    """What is asked of an index, see `Index.query`."""

    k: int
    side: Side
    where: npt.ArrayLike | str | None
    group_by: str | npt.ArrayLike | None
    reduce: Reduce
    exclude_self: bool
    rerank: int | None = None
    train: Samples | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.k, Integral) or self.k < 1:
            raise ValueError(f"k must be an integer of 1 or more, got {self.k!r}.")
        for name, value, kinds in (("side", self.side, Side), ("reduce", self.reduce, Reduce)):
            if value not in get_args(kinds):
                raise ValueError(f"{name} must be one of {get_args(kinds)}, got {value!r}.")
        if self.rerank is None:
            return
        if self.train is None:
            raise ValueError(
                "rerank computes full gradients: give the training samples as train=rs.Samples(dataset, task, "
                "checkpoints, timesteps)."
            )
        if self.group_by is not None:
            raise ValueError("rerank orders samples, not groups; leave out group_by= or rerank=.")
        if self.rerank < self.k:
            raise ValueError(f"rerank must be at least k = {self.k}, got {self.rerank}.")

    @property
    def signs(self) -> tuple[int, ...]:
        """1 for proponents, -1 for opponents."""
        return {"proponents": (1,), "opponents": (-1,), "both": (1, -1)}[self.side]


def answer(index: IndexReader, queries: SketchStore | Samples, question: Question, client: Client | None) -> TopK:
    """See `Index.query`."""
    if client is not None and not isinstance(index.url, str | os.PathLike):
        raise ValueError("workers cannot reach an index in this process's memory; build it at a path or URL.")
    store = index.check_store()
    estimator = index.estimator
    if question.rerank and estimator.damping is not None:
        raise ValueError(
            f"{index.meta['estimator']['kind']} has no exact scores: its ridge over full gradients cannot be solved; "
            "rerank an index of TracIn, ReTrac, GradDot or GradCos, such as ReTrac(pairing='matched')."
        )
    if question.rerank and "precondition" in index.meta:
        raise ValueError("rerank computes plain gradients, but the store's were preconditioned; leave out rerank=.")
    if estimator.squared and question.side != "proponents":
        raise ValueError("a squared score is never negative, so it has no opponents; ask for side='proponents'.")
    samples = queries if isinstance(queries, Samples) else None
    if question.rerank and samples is None:
        raise ValueError("rerank computes full gradients: give the queries as rs.Samples(...), not as a store.")
    train = None
    if samples is not None:
        if store is None:
            raise ValueError("to sketch the queries, the store that the index was built from is needed.")
        samples = replace(samples, timesteps=plans_for_queries(samples.timesteps, store))
        train = as_measured(question.train, store) if question.rerank and question.train is not None else None
        queries = samples.sketch(like=store)
    if not isinstance(queries, SketchStore):
        raise ValueError(
            f"queries must be a SketchStore or rs.Samples(dataset, task, checkpoints, timesteps), got {type(queries)}."
        )
    rows = index.query_rows(queries)
    if samples is not None and train is not None:
        scan = _Scan(index, rows, queries.ids, question, which(question.where, index), client)
        found = scan.samples(max(question.rerank or 0, question.k + 1))
        found, ranks = _rerank(scan, found, samples, train, None if store is None else (queries, store))
        return _topk(scan, found, question.k, ranks)
    return answer_rows(index, rows, queries.ids, question, client)


def answer_rows(
    index: IndexReader, rows: Float32, query_ids: npt.NDArray[Any], question: Question, client: Client | None = None
) -> TopK:
    """The answer to queries whose rows `[c, q, k]` are known already, without reranking."""
    scan = _Scan(index, rows, query_ids, question, which(question.where, index), client)
    if question.group_by is not None:
        labels, values = scan.groups(question.group_by)
        return _topk(scan, Found(values, labels, np.zeros((*values.shape, 0))), question.k)
    return _topk(scan, scan.samples(question.k + 1), question.k)


@dataclass(frozen=True, eq=False)
class _Scan:
    """The chunks of an index, to be scanned for some queries by tasks here or on workers."""

    index: IndexReader
    rows: Float32
    query_ids: npt.NDArray[Any]
    question: Question
    mask: Bools | None
    client: Client | None

    @property
    def _matching(self) -> list[int]:
        """Numbers of the chunks that hold a sample that counts."""
        mask = self.mask
        return [i for i, samples in enumerate(self.index.chunks) if mask is None or mask[samples].any()]

    def samples(self, k: int) -> Found:
        """The k best samples of each lane; of a squared score, those of the largest squares."""
        if not self.index.estimator.squared:
            return self._best(k, self.question.signs)
        both = self._best(k, (1, -1))
        q = self.rows.shape[1]
        up, down = (
            Found(both.scores[lanes], both.ids[lanes], both.parts[lanes]) for lanes in (slice(q), slice(q, None))
        )
        up.scores[up.scores < 0], down.scores[down.scores <= 0] = -np.inf, -np.inf  # each sample on one side
        best = merge([up, down], k)
        return replace(best, scores=np.where(best.scores == -np.inf, -np.inf, best.scores**2))

    def _best(self, k: int, signs: tuple[int, ...]) -> Found:
        question, chunks = self.question, self._matching
        workers = torch.get_num_threads() if self.client is None else sum(worker_threads(self.client).values())
        count = min(len(chunks), max(workers, -(-len(chunks) // RUN_CHUNKS) if self.client else 1))
        floor = None if self.client else np.full(len(signs) * self.rows.shape[1], -np.inf)
        excluded = self.query_ids if question.exclude_self else None
        common = (k, signs, excluded, floor)
        if self.client is None and count == 1:  # one thread: a graph of one task would cost a millisecond
            return _scan_run(self.index, chunks, self._share(self.mask, chunks), self.rows, common)
        runs = self._tasks("scan", _scan_run, [list(run) for run in np.array_split(chunks, count)], common)
        while len(runs) > 1:
            merged = delayed(merge)
            runs = [merged(runs[i : i + MERGE_WIDTH], k) for i in range(0, len(runs), MERGE_WIDTH)]
        found: Found = compute(runs, self.client)[0]
        return found

    def groups(self, group_by: str | npt.ArrayLike) -> tuple[npt.NDArray[Any], Float64]:
        """Labels and scores of each lane's k best groups, `[lane, k]` both; -inf for groups without samples.

        Sums are formed in an order that depends on the index's chunks and the mask alone.
        """
        labels, codes = _labels(group_by, self.index)
        chunks = self._matching
        runs = [chunks[i : i + GROUP_CHUNKS] for i in range(0, len(chunks), GROUP_CHUNKS)]
        question = self.question
        excluded = self.query_ids if question.exclude_self else None
        common = (question.signs, excluded, question.reduce, len(labels))
        level = self._tasks("group", _group_run, runs, common, codes)
        while len(level) > 1:
            merged = delayed(_merge_groups)
            level = [merged(level[i : i + MERGE_WIDTH], question.reduce) for i in range(0, len(level), MERGE_WIDTH)]
        totals, counts = compute(level, self.client)[0]
        many = np.tile(counts, (len(question.signs), 1))
        if question.reduce == "mean":
            totals = totals / np.maximum(many, 1)
        totals = np.where(many > 0, totals, -np.inf)
        best = np.argsort(-totals, axis=1, kind="stable")  # labels are sorted: equal scores are ordered by label
        order = best[:, : question.k]
        return labels[order], np.take_along_axis(totals, order, 1)

    def _tasks(
        self, name: str, function: Any, runs: list[list[int]], common: tuple[Any, ...], codes: Any = None
    ) -> list[Any]:
        """One delayed task per run of chunks, with its share of the mask and of the group codes."""
        source = self.index if self.client is None else _for_workers(self.index)
        rows: Any = self.rows if self.client is None else constant(self.rows)
        task, share = delayed(function), self._share

        made = []
        for run in runs:
            key = f"{name}-chunks-{run[0]}-{run[-1] + 1}-{uuid.uuid4().hex[:8]}"
            extra = [] if codes is None else [share(codes, run)]
            with self._at_home(run):
                made.append(task(source, run, share(self.mask, run), rows, common, *extra, dask_key_name=key))
        return made

    def _at_home(self, run: list[int]) -> AbstractContextManager[Any]:
        """Sends a task to the same worker for every query, if that is there: it has mapped and verified its chunks."""
        if self.client is None:
            return nullcontext()
        homes = [address for address, threads in sorted(worker_threads(self.client).items()) for _ in range(threads)]
        if not homes:
            return nullcontext()
        home = homes[run[len(run) // 2] * len(homes) // len(self.index.chunks)]
        placed: AbstractContextManager[Any] = dask.annotate(workers=[home], allow_other_workers=True)
        return placed

    def _share(self, values: npt.NDArray[Any] | None, run: list[int]) -> list[Any]:
        """For each chunk of a run, its part of values `[n]`."""
        chunks = self.index.chunks
        return [None if values is None else values[chunks[number]] for number in run]


def _for_workers(index: IndexReader) -> Source:
    return whereabouts(index.url), json.dumps(index.meta, sort_keys=True)


def _opened(source: Source) -> IndexReader:
    return source if isinstance(source, IndexReader) else open_on_worker(*source)


def _chunks(index: IndexReader, run: list[int], masks: list[Bools | None]) -> Iterator[Chunk]:
    for number, mask in zip(run, masks, strict=True):
        chunk = index.chunk(int(number))
        yield chunk if mask is None else replace(chunk, mask=mask)


def _scan_run(
    source: Source, run: list[int], masks: list[Bools | None], rows: Float32, common: tuple[Any, ...]
) -> Found:
    k, signs, excluded, floor = common
    index = _opened(source)
    return top(
        _chunks(index, run, masks),
        rows,
        k,
        signs=signs,
        query_ids=excluded,
        floor=floor,
        parts=index.meta.get("slots", 1),
    )


def _group_run(
    source: Source,
    run: list[int],
    masks: list[Bools | None],
    rows: Float32,
    common: tuple[Any, ...],
    codes: list[npt.NDArray[np.int64]],
) -> tuple[Float64, npt.NDArray[np.int64]]:
    """Totals `[lane, g]` and counts `[q, g]` of a run of chunks."""
    signs, excluded, reduce, groups = common
    index = _opened(source)
    q = rows.shape[1]
    combine: Any = np.maximum if reduce == "max" else np.add
    neutral = -np.inf if reduce == "max" else 0.0
    totals, counts = np.full((len(signs) * q, groups), neutral), np.zeros((q, groups), np.int64)
    for chunk, code in zip(_chunks(index, run, masks), codes, strict=True):
        counted = np.ones((q, len(code)), dtype=bool) if chunk.mask is None else np.tile(chunk.mask, (q, 1))
        if excluded is not None:
            counted &= chunk.ids[None] != excluded[:, None]
        values = _readout(index, scores(chunk, rows))
        order = np.argsort(code, kind="stable")
        starts = np.flatnonzero(np.diff(code[order], prepend=-1))
        present = code[order][starts]
        counts[:, present] += np.add.reduceat(counted[:, order].astype(np.int64), starts, axis=1)
        for side, sign in enumerate(signs):
            lanes = np.where(counted, sign * values, neutral)[:, order]
            part = slice(side * q, (side + 1) * q)
            totals[part, present] = combine(totals[part, present], combine.reduceat(lanes, starts, axis=1))
    return totals, counts


def _merge_groups(
    parts: list[tuple[Float64, npt.NDArray[np.int64]]], reduce: Reduce
) -> tuple[Float64, npt.NDArray[np.int64]]:
    totals, counts = parts[0]
    for total, count in parts[1:]:
        totals = np.maximum(totals, total) if reduce == "max" else totals + total
        counts = counts + count
    return totals, counts


def _rerank(
    scan: _Scan, found: Found, queries: Samples, train: Samples, sketched: tuple[SketchStore, SketchStore] | None
) -> tuple[Found, npt.NDArray[np.int64]]:
    """The m best by sketch in the order of their exact scores, and their ranks by sketch."""
    index, signs = scan.index, scan.question.signs
    found = _filled(found, scan.question.k)
    candidates = np.unique(found.ids)
    exact = exact_scores(
        queries, train, candidates, index.estimator, index.meta["checkpoints"], index.meta["fingerprint"], sketched
    )
    values = np.repeat(signs, len(exact))[:, None] * np.tile(exact, (len(signs), 1))
    values = np.take_along_axis(values, np.searchsorted(candidates, found.ids), 1)
    order = np.stack([np.lexsort((ids, -lane)) for ids, lane in zip(found.ids, values, strict=True)])
    ids, best = np.take_along_axis(found.ids, order, 1), np.take_along_axis(values, order, 1)
    return Found(best, ids, np.zeros((*best.shape, 0))), order + 1


def _filled(found: Found, k: int) -> Found:
    """Only the places that every lane has a sample for; ValueError when that would cut a lane short of its best k."""
    counts = (found.scores > -np.inf).sum(1)
    width = int(counts.min())
    if width < min(k, int(counts.max())):
        raise ValueError(
            f"k = {k} is more than every query has: with exclude_self= some have only {width} left; ask for at most "
            f"{width}, or widen where=."
            if width
            else "where= and exclude_self= leave some queries no sample to score; widen where=."
        )
    return Found(found.scores[:, :width], found.ids[:, :width], found.parts[:, :width])


def _topk(scan: _Scan, found: Found, k: int, ranks: npt.NDArray[np.int64] | None = None) -> TopK:
    """The answer, lanes of both sides side by side; `found` may hold more than k places."""
    question, q = scan.question, len(scan.query_ids)
    found = _filled(found, k)
    if not found.scores.shape[1]:
        raise ValueError("where= and exclude_self= leave no sample to score.")
    errors, resolved = _uncertainty(found, scan.index.estimator.squared)

    def beside(values: npt.NDArray[Any]) -> npt.NDArray[Any]:
        return np.concatenate(np.split(values[:, :k], len(values) // q), axis=1)

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
    )


def _uncertainty(found: Found, squared: bool) -> tuple[Float64 | None, Bools | None]:
    """Standard errors, and whether each score stands clear of the next one; None where rows have one part.

    A score is a sum of T measurements, so that its variance is estimated by T / (T - 1) times the sum of the squares of
    their deviations from their mean, and that of a difference by those of the differences.
    """
    t = found.parts.shape[2]
    if not t:
        return None, None
    parts = found.parts * (2 * found.parts.sum(2, keepdims=True) if squared else 1)  # a square, to first order

    def error(values: Float64) -> Float64:
        root: Float64 = np.sqrt(t / (t - 1) * np.square(values - values.mean(2, keepdims=True)).sum(2))
        return root

    resolved = np.ones(found.scores.shape, dtype=bool)  # nothing stands behind the last one
    gap = found.scores[:, :-1] - found.scores[:, 1:]
    resolved[:, :-1] = gap > RESOLVED * error(parts[:, :-1] - parts[:, 1:])
    return error(parts), resolved


def _labels(group_by: str | npt.ArrayLike, index: IndexReader) -> tuple[npt.NDArray[Any], npt.NDArray[np.integer]]:
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


def all_scores(index: IndexReader, queries: SketchStore) -> dask.array.Array:
    """See `Index.scores`."""
    import dask.array  # and with it pandas and SciPy: 60 MB that a query has no use for

    index.check_store()
    rows = index.query_rows(queries)
    source = _for_workers(index) if isinstance(index.url, str | os.PathLike) else index
    one, shared = delayed(_chunk_scores), dask.delayed(rows)
    parts = [
        dask.array.from_delayed(one(source, number, shared), (rows.shape[1], part.stop - part.start), np.float64)
        for number, part in enumerate(index.chunks)
    ]
    return dask.array.concatenate(parts, axis=1)


def all_scores_of(index: IndexReader, rows: Float32, samples: int) -> Float64:
    """Scores of queries by their rows `[c, q, k]` for about so many samples, `[q, n]`, of chunks from all over."""
    wanted = max(1, samples // (index.chunks[0].stop - index.chunks[0].start))
    numbers = range(0, len(index.chunks), max(1, len(index.chunks) // wanted))
    return np.concatenate([_readout(index, scores(index.chunk(number), rows)) for number in numbers], axis=1)


def _chunk_scores(source: Source, number: int, rows: Float32) -> Float64:
    index = _opened(source)
    (chunk,) = _chunks(index, [number], [None])
    return _readout(index, scores(chunk, rows))


def _readout(index: IndexReader, values: Float64) -> Float64:
    return np.square(values) if index.estimator.squared else values
