"""All chunks of an index, scanned for some queries by tasks here or on workers, and merged in a tree."""

from __future__ import annotations

import uuid
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from retrac_scale.arrays import Bools, Float32, Float64, Int64
from retrac_scale.index.plain import light
from retrac_scale.index.reader import IndexReader
from retrac_scale.index.scan import Found, merge, top
from retrac_scale.query.groups import Groups, group_run, labels_of, merge_groups, with_errors
from retrac_scale.query.question import Question
from retrac_scale.query.source import Source, chunks_of, for_workers, opened
from retrac_scale.runtime.graphs import compute, constant, delayed
from retrac_scale.runtime.here import threads_here
from retrac_scale.runtime.workers import worker_threads

if TYPE_CHECKING:
    from distributed import Client

MERGE_WIDTH = 16
RUN_CHUNKS = 64
GROUP_CHUNKS = 16


@dataclass(frozen=True, eq=False)
class Scan:
    """The chunks of an index, to be scanned for some queries by tasks here or on workers.

    Attributes:
        index: whose chunks.
        rows: of the queries, `[c, q, k]`.
        query_ids: `[q]`.
        question: what is asked.
        mask: the samples that count, `[n]`, or by each of several filters, `[m, n]`; None for all.
        client: of the workers; None for threads here.
        of: of several filters, which is each query's, `[q]`; groups are formed under one.
    """

    index: IndexReader
    rows: Float32
    query_ids: npt.NDArray[Any]
    question: Question
    mask: Bools | None
    client: Client | None
    of: Int64 | None = None

    @property
    def _matching(self) -> list[int]:
        """Numbers of the chunks that hold a sample that counts."""
        mask = self.mask
        chunks = [(i, samples) for i, samples in enumerate(self.index.chunks) if samples.start < samples.stop]
        return [i for i, samples in chunks if mask is None or mask[..., samples].any()]

    def _entries(self, chunks: list[int]) -> int:
        """Of the rows of some chunks."""
        c, _, k = self.index.shape
        every = self.index.chunks
        samples: int = sum(every[number].stop - every[number].start for number in chunks)
        return c * samples * k

    def samples(self, k: int) -> Found:
        """The k best samples of each lane; of a squared score, those of the largest squares."""
        if not self.index.estimator.squared:
            return self._best(k, self.question.signs)
        both = self._best(k, (1, -1))
        q = self.rows.shape[1]
        up, down = both.some(slice(q)), both.some(slice(q, None))
        up.scores[up.scores < 0], down.scores[down.scores <= 0] = -np.inf, -np.inf  # each sample on one side
        best = merge([up, down], k)
        return replace(best, scores=np.where(best.scores == -np.inf, -np.inf, best.scores**2))

    def _best(self, k: int, signs: tuple[int, ...]) -> Found:
        question, chunks = self.question, self._matching
        is_light = self.client is None and light.take(self._entries(chunks), self.rows.shape[1])
        if self.client is None:
            count = 1 if is_light else min(len(chunks), threads_here())
        else:
            workers = sum(worker_threads(self.client).values())
            count = min(len(chunks), max(workers, -(-len(chunks) // RUN_CHUNKS)))
        floor = None if self.client else np.full(len(signs) * self.rows.shape[1], -np.inf)
        excluded = self.query_ids if question.exclude_self else None
        common = (k, signs, excluded, floor, is_light, self.of)
        if self.client is None and count == 1:  # one thread: a graph of one task would cost a millisecond
            return _scan_run(self.index, chunks, self._share(self.mask, chunks), self.rows, common)
        runs = self._tasks("scan", _scan_run, [list(run) for run in np.array_split(chunks, count)], common)
        while len(runs) > 1:
            merged = delayed(merge)
            runs = [merged(runs[i : i + MERGE_WIDTH], k) for i in range(0, len(runs), MERGE_WIDTH)]
        found: Found = compute(runs, self.client)[0]
        return found

    def groups(self, group_by: str | npt.ArrayLike, left_out: list[npt.NDArray[Any]] | None = None) -> Groups:
        """Each lane's k best groups, some samples left out, for each query."""
        return best_groups(*self.all_groups(group_by, left_out), self.question.k)

    def all_groups(
        self, group_by: str | npt.ArrayLike, left_out: list[npt.NDArray[Any]] | None = None
    ) -> tuple[npt.NDArray[Any], Float64, Float64 | None, Float64, Float64]:
        """Labels `[g]`, and what `with_errors` gives, `[lane, g]` each.

        Sums are formed in an order that depends on the index's chunks and the mask alone.
        """
        labels, codes = labels_of(group_by, self.index)
        chunks = self._matching
        runs = [chunks[i : i + GROUP_CHUNKS] for i in range(0, len(chunks), GROUP_CHUNKS)]
        question = self.question
        excluded = self.query_ids if question.exclude_self else None
        common = (question.signs, excluded, left_out, question.reduce, len(labels))
        level = self._tasks("group", group_run, runs, common, codes)
        while len(level) > 1:
            merged = delayed(merge_groups)
            level = [merged(level[i : i + MERGE_WIDTH], question.reduce) for i in range(0, len(level), MERGE_WIDTH)]
        sums, counts = compute(level, self.client)[0]
        many = np.tile(counts, (len(question.signs), 1))
        return labels, *with_errors(sums, many, question.reduce)

    def _tasks(
        self, name: str, function: Any, runs: list[list[int]], common: tuple[Any, ...], codes: Any = None
    ) -> list[Any]:
        """One delayed task per run of chunks, with its share of the mask and of the group codes."""
        source = self.index if self.client is None else for_workers(self.index)
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
        import dask

        placed: AbstractContextManager[Any] = dask.annotate(workers=[home], allow_other_workers=True)
        return placed

    def _share(self, values: npt.NDArray[Any] | None, run: list[int]) -> list[Any]:
        """For each chunk of a run, its part of values `[..., n]`."""
        chunks = self.index.chunks
        return [None if values is None else values[..., chunks[number]] for number in run]


def best_groups(
    labels: npt.NDArray[Any],
    score: Float64,
    error: Float64 | None,
    share: Float64,
    share_error: Float64,
    k: int,
) -> Groups:
    """Each lane's k best groups, of labels `[g]` and values `[lane, g]`."""
    order = np.argsort(-score, axis=1, kind="stable")[:, :k]  # labels are sorted: equal scores are ordered by label

    def first(values: Float64) -> Float64:
        return np.take_along_axis(values, order, 1)

    errors = None if error is None else first(error)
    return Groups(labels[order], first(score), errors, first(share), first(share_error))


def _scan_run(
    source: Source, run: list[int], masks: list[Bools | None], rows: Float32, common: tuple[Any, ...]
) -> Found:
    k, signs, excluded, floor, is_light, of = common
    index = opened(source)
    return top(
        chunks_of(index, run, masks, of),
        rows,
        k,
        signs=signs,
        query_ids=excluded,
        floor=floor,
        parts=index.meta.get("slots", 1),
        light=is_light,
    )
