"""build_index(): a store made ready for questions."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tqdm.auto import tqdm

from retrac_scale.estimators import Estimator, recommended
from retrac_scale.index.build import IndexDtype, write_index
from retrac_scale.measurement.halves import warn_of_own_noise
from retrac_scale.query.index import Index
from retrac_scale.store import SketchStore
from retrac_scale.store.schema import Url

if TYPE_CHECKING:
    from distributed import Client

MOMENT_S = 2.0


def build_index(
    store: SketchStore,
    estimator: Estimator | None = None,
    out: Url = None,
    *,
    dtype: IndexDtype = "int8",
    client: Client | None = None,
    progress: bool | str = True,
) -> Index:
    """Collapse a complete store for one estimator; an index of the same store and estimator at `out` is kept.

    When the store has gained or lost samples since, they are added to the index or marked in it, to the same answers
    (to rounding, with a ridge); where every row depends on all samples, as a ridge over few (under 8 k) has it, or
    when a file on this disk fails its checksum, it is built whole. Readers
    keep the old index until the new one is complete. Another process that builds the same index is waited for.
    Deleted samples are left out. Memory stays below a few blocks of the store per thread; an estimator that fits a
    ridge takes a few float64 matrices of min(n, k) x k per part of a row, checkpoint and thread besides. Rows in int8
    change a score by at most sum_c |w_c| max_k |row_k| sum_k |query_k| / 254, row and query as they are stored and
    asked: where each timestep has a ridge, the parts of training rows are brought to about one mean length, so that one
    scale serves them all, and those of the query are divided by what theirs were multiplied with.

    Args:
        store: the training side.
        estimator: `ReTracRidge()`, `ReTrac()`, ...; None takes what is recommended: `ReTracRidge()` for a store under
            common noise, else `ReTrac()`; `DTRAK()` or `DAS()` where the measure is theirs.
        out: path, fsspec URL, or None for memory.
        dtype: how rows are stored, "int8", "float16" or "float32".
        client: a `distributed.Client`; store and `out` must then be reachable from its workers.
        progress: show a bar of rows once it takes more than a moment, under this name if it is one.

    Raises:
        IncompleteStoreError: blocks are missing.
        ValueError: `out` holds something else, the store lacks what the estimator needs or was measured otherwise, or
            the estimator's ridge is singular.
    """
    estimator = recommended(store) if estimator is None else estimator
    passes = 1 if getattr(estimator, "damping", None) is None else 2
    rows, name = int(store.alive.sum()) * len(store.checkpoints), progress if isinstance(progress, str) else "index"
    with tqdm(total=passes * rows, unit="row", desc=name, delay=MOMENT_S, disable=not progress) as bar:
        reader, built = write_index(store, estimator, out, dtype=dtype, client=client, done=bar.update)
        bar.total = bar.n  # fewer, where an index grew
    if built and reader.estimator.pairing == "matched":
        warn_of_own_noise(reader)
    return Index(reader.root, out, store)
