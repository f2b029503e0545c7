"""An Index: what users ask."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy.typing as npt

from retrac_scale.index.reader import IndexReader, complete_root
from retrac_scale.query.asking import answer
from retrac_scale.query.explain import Explanation, explain
from retrac_scale.query.question import Question
from retrac_scale.query.source import all_scores
from retrac_scale.query.topk import Duplicates, Reduce, Side, TopK
from retrac_scale.store import SketchStore
from retrac_scale.store.schema import Url

if TYPE_CHECKING:
    import dask.array
    from distributed import Client

    from retrac_scale.sketching.samples import Samples


class Index(IndexReader):
    """An index that answers; get one from `build_index` or `open_index`."""

    def query(
        self,
        queries: SketchStore | Samples,
        k: int = 10,
        *,
        side: Side = "proponents",
        where: npt.ArrayLike | str | None = None,
        group_by: str | npt.ArrayLike | None = None,
        reduce: Reduce = "sum",
        exclude_self: bool = False,
        client: Client | None = None,
        rerank: int | None = None,
        train: Samples | None = None,
        duplicates: Duplicates | float = "keep",
        together: bool = False,
    ) -> TopK:
        """The k training samples with the largest (proponents) or smallest (opponents) score for each query.

        The order is that of float64 scores of the stored rows with unquantised queries; equal scores are ordered by
        id. It does not depend on chunks, threads or workers.

        Args:
            queries: a small SketchStore, made with `sketch(..., like=store)`, or `Samples`, sketched here.
            k: how many; fewer come back when fewer samples qualify.
            side: "proponents", "opponents", or "both": k of each, proponents first.
            where: which samples count: an expression over the columns and `id`, such as "label == 3 and year < 2000",
                a boolean mask `[n]`, or a list of sample ids; None for all.
            group_by: a column, or labels `[n]`: answer with groups in place of samples.
            reduce: a group's score: the sum or mean of its samples' scores, or the largest ("max", of opponents the
                smallest).
            exclude_self: leave the sample with the query's own id out of its answer.
            client: a `distributed.Client`; None scans on threads here, as many as torch is set to.
            rerank: take so many by sketch and put them in the order of their exact scores, from full float32 gradients;
                needs `queries` as Samples, and `train`.
            train: the training samples, to be measured again for `rerank`.
            duplicates: "fold" puts near-duplicates among the best samples together: a list has the best of each family,
                with the others in `TopK.copies`, and groups count it alone. Copies are alike (`query.copies.likeness`)
                to 0.7 or more, 0.95 where the estimator has no ridge; or give the number.
            together: all queries as one question, read some at a time from a store: one list, of means over the queries
                of scores and of groups' shares; errors of groups then are standard errors over queries.

        Returns:
            TopK, best first.

        Raises:
            StaleIndexError: the store has changed since the index was built, or is gone.
            ValueError: the queries do not fit the index, or an argument is wrong; says which and what to do.
        """
        question = Question(k, side, where, group_by, reduce, exclude_self, rerank, train, duplicates, together)
        return answer(self, queries, question, client)

    def scores(self, queries: SketchStore) -> dask.array.Array:
        """All scores as a lazy dask array, float64 `[q, n]`, one task per chunk, in the order of `ids`.

        Products are float32 for int8 and float16 rows, float64 for float32 rows.
        """
        return all_scores(self, queries)

    def explain(self, query: SketchStore, id: Any) -> Explanation:
        """What each checkpoint and timestep contributes to the score of one training sample for one query.

        Args:
            query: sketches of one query, e.g. `rs.take(queries, [query_id])`.
            id: of the training sample.
        """
        return explain(self, query, id)


def open_index(url: Url) -> Index:
    """Open an existing Index.

    Raises:
        FileNotFoundError: nothing is there.
        ValueError: what is there is no index, one of a newer format, or one whose building was interrupted.
    """
    return Index(complete_root(url), url)
