"""Build and open an Index: a store seen by one estimator, collapsed over timesteps, laid out for scanning."""

from __future__ import annotations

import functools
import logging
import os
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt
import zarr
from zarr.storage import LocalStore

from retrac_scale.estimators import Estimator, common_timesteps, estimator_from_spec
from retrac_scale.estimators.fitting import fit, rows_at
from retrac_scale.estimators.ridge import Ridge
from retrac_scale.execution import Task, results
from retrac_scale.scan import Chunk
from retrac_scale.store import DamagedStoreError, IncompleteStoreError, SketchStore, objects, open_store
from retrac_scale.store.compatibility import COMPARED, check_compatible
from retrac_scale.store.encoding import Float32, encode
from retrac_scale.store.mapping import map_chunk
from retrac_scale.store.reader import open_root
from retrac_scale.store.schema import (
    ATTRIBUTE,
    FORMAT_VERSION,
    Url,
    blocks,
    differences,
    get_array,
    get_group,
    is_remote,
    new_array,
    read_ids,
    zarr_location,
)

if TYPE_CHECKING:
    import dask.array
    from distributed import Client

    from retrac_scale.explain import Explanation
    from retrac_scale.samples import Samples
    from retrac_scale.topk import TopK

logger = logging.getLogger(__name__)

IndexDtype = Literal["int8", "float16", "float32"]
Side = Literal["proponents", "opponents", "both"]
Reduce = Literal["sum", "mean", "max"]

CHUNK_BYTES = 32 * 2**20
MIN_CHUNKS = 8
MIN_CHUNK_SAMPLES = 64
NORM_ROWS = 256
KEPT_MAPS = 8192
"""Files that an index keeps mapped; Linux lets a process have some 65,000 (vm.max_map_count)."""
SETTLED_NS = 10**9
ASKED = ("format", "store", "measure", "estimator", "dtype")
"""What of an index's description was asked for; the rest is what its store was when it was built."""
Stamp = tuple[int, ...]
UNWRITTEN = -128
"""Fill value of int8 rows, which no row holds; those of floats are NaN: a missing chunk is never data."""


class StaleIndexError(ValueError):
    """The store that an index was built from is no longer what it was."""


class Index:
    """Rows `[c, n, k]` of one estimator, their scales `[c, n]` with the checkpoint weights in them, and the ids.

    Get one from `build_index` or `open_index`. A stored row times its scale is w_c times the estimator's training row:
    preconditioned, where the estimator does that, so that a query's own row is plain and the score an inner product.
    `meta["fit"]` then says how each checkpoint's ridge was damped.
    """

    def __init__(self, root: zarr.Group, url: Url, store: SketchStore | None = None) -> None:
        self.root = root
        self.url = url
        self.meta: dict[str, Any] = dict(root.attrs[ATTRIBUTE])  # type: ignore[arg-type]
        self._store = store
        self._arrays = {name: get_array(root, name) for name in ("row", "scale", "norm", "id")}
        self._chunks: dict[int, Chunk] = {}
        self._checked: tuple[SketchStore, Stamp] | None = None

    @property
    def estimator(self) -> Estimator:
        """The estimator it was built with."""
        return estimator_from_spec(self.meta["estimator"])

    @property
    def checkpoints(self) -> list[str]:
        """Checkpoint names, in the order of the rows."""
        return list(self.meta["checkpoints"])

    @property
    def ids(self) -> npt.NDArray[Any]:
        """Sample ids `[n]`; deleted samples are left out."""
        return read_ids(self.root)

    @property
    def columns(self) -> dict[str, npt.NDArray[Any]]:
        """The user's columns, `{name: [n]}`."""
        group = get_group(self.root, "column")
        return {name: _listed(np.asarray(get_array(group, name)[:])) for name in sorted(group.array_keys())}

    @property
    def shape(self) -> tuple[int, int, int]:
        """(c, n, k)."""
        c, n, k = self._arrays["row"].shape
        return c, n, k

    @functools.cached_property
    def chunks(self) -> list[slice]:
        """Sample ranges of the chunks, the units of scanning."""
        return blocks(self.shape[1], self._arrays["row"].chunks[1])

    def chunk(self, number: int) -> Chunk:
        """One chunk: a map of its files where they can be mapped, read through zarr if not.

        The first maps are kept for the next call, as many as a process may have of them.

        Raises:
            DamagedStoreError: a file is missing or damaged.
        """
        if number in self._chunks:
            return self._chunks[number]
        mapped = [map_chunk(self._arrays["row"], (c, number, 0)) for c in range(self.shape[0])]
        samples = self.chunks[number]
        rows = [self._read("row", c, samples) if view is None else view[0] for c, view in enumerate(mapped)]
        scale, norm = (self._plane(name, number, samples) for name in ("scale", "norm"))
        ids = map_chunk(self._arrays["id"], (number,))
        ids = _listed(np.asarray(self._arrays["id"][samples])) if ids is None else ids
        kept = all(view is not None for view in mapped) and len(self._chunks) * (3 * len(rows) + 1) < KEPT_MAPS
        chunk = Chunk(rows, scale, norm, ids, kept=kept)
        fill = self._arrays["row"].fill_value
        if np.isnan(scale).any() or any(np.array_equal(row[0, 0], fill, equal_nan=True) for row in rows):
            raise DamagedStoreError(
                f"samples {samples.start} .. {samples.stop - 1} of the index {self.url} are missing."
            )
        if kept:
            self._chunks[number] = chunk
        return chunk

    def _plane(self, name: str, number: int, samples: slice) -> Float32:
        views = [map_chunk(self._arrays[name], (c, number)) for c in range(self.shape[0])]
        if len(views) == 1 and views[0] is not None:
            return views[0]
        return np.stack([self._read(name, c, samples) if view is None else view[0] for c, view in enumerate(views)])

    def _read(self, name: str, checkpoint: int, samples: slice) -> npt.NDArray[Any]:
        return np.asarray(self._arrays[name][checkpoint, samples])

    def check_store(self) -> SketchStore | None:
        """The store that the index was built from; None when that was in the memory of another process.

        Raises:
            StaleIndexError: the store is gone, has another fingerprint, or has changed since.
        """
        url, store = self.meta["store"], self._store
        if self._checked is not None and _stamp(self._checked[0]) == self._checked[1]:
            return self._checked[0]
        if url is not None:
            try:
                store = open_store(url, measure=self.meta["measure"])
            except (FileNotFoundError, ValueError) as error:
                raise StaleIndexError(
                    f"the index {self.url or 'in memory'} belongs to the store {url}, which cannot be used: {error}"
                ) from error
        if store is None:
            return None
        found = differences(self.meta["fingerprint"], {key: store.fingerprint.get(key) for key in COMPARED})
        if not found and store.revision != self.meta["revision"]:
            found = ["samples, checkpoints or blocks were added, deleted or written anew"]
        if found:
            known = url is not None or self.url is None  # else build_index cannot tell whose index it would replace
            raise StaleIndexError(
                f"the store {url or 'in memory'} has changed since the index was built: {'; '.join(found)}; "
                f"build the index again{'' if known else ' at another path'}."
            )
        stamp = _stamp(store)
        self._checked = None if stamp is None else (store, stamp)
        return store

    def query_rows(self, queries: SketchStore) -> Float32:
        """The estimator's rows of the queries, float32 `[c, q, k]`, without checkpoint weights.

        Raises:
            ValueError: the queries were sketched otherwise than the training side; says which field differs.
        """
        check_compatible(self.meta["fingerprint"], self.checkpoints, queries.fingerprint, queries.checkpoints)
        estimator = self.estimator
        estimator.check(queries)
        if estimator.pairing == "matched" and common_timesteps(queries) != self.meta["timesteps"]:
            raise ValueError(
                "matched pairing needs the index's timesteps in the queries; sketch them with the same plan."
            )
        if estimator.width(queries) != self.shape[2]:
            raise ValueError(
                f"the queries have rows of {estimator.width(queries)} entries, the index of {self.shape[2]}."
            )
        return np.stack([estimator.rows(queries, name) for name in self.checkpoints])

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

        Returns:
            TopK, best first.

        Raises:
            StaleIndexError: the store has changed since the index was built, or is gone.
            ValueError: the queries do not fit the index, or an argument is wrong; says which and what to do.
        """
        from retrac_scale.query import Question, answer  # at call time: the street runs from index to query

        question = Question(k, side, where, group_by, reduce, exclude_self, rerank, train)
        return answer(self, queries, question, client)

    def scores(self, queries: SketchStore) -> dask.array.Array:
        """All scores as a lazy dask array, float64 `[q, n]`, one task per chunk, in the order of `ids`.

        Products are float32 for int8 and float16 rows, float64 for float32 rows.
        """
        from retrac_scale.query import all_scores

        return all_scores(self, queries)

    def explain(self, query: SketchStore, id: Any) -> Explanation:
        """What each checkpoint and timestep contributes to the score of one training sample for one query.

        Args:
            query: sketches of one query, e.g. `rs.take(queries, [query_id])`.
            id: of the training sample.
        """
        from retrac_scale.explain import explain

        return explain(self, query, id)

    def __repr__(self) -> str:
        c, n, k = self.shape
        return f"Index({self.url!r}: {self.estimator}, {c} checkpoints, {n} samples, k = {k})"


def build_index(
    store: SketchStore, estimator: Estimator, out: Url, *, dtype: IndexDtype = "int8", client: Client | None = None
) -> Index:
    """Collapse a complete store for one estimator; an index of the same store and estimator at `out` is kept.

    When the store has changed since, or a file on this disk fails its checksum, the index at `out` is replaced; those
    who have it open are refused from then on.
    Deleted samples are left out. Memory stays below a few blocks of the store per thread; an estimator that fits a
    ridge takes a few float64 matrices of min(n, k) x k per checkpoint and thread besides. Rows in int8 change a score
    by at most sum_c |w_c| max_k |row_k| sum_k |query_k| / 254.

    Args:
        store: the training side.
        estimator: `TracIn()`, `ReTrac()`, ...
        out: path, fsspec URL, or None for memory.
        dtype: how rows are stored, "int8", "float16" or "float32".
        client: a `distributed.Client`; store and `out` must then be reachable from its workers.

    Raises:
        IncompleteStoreError: blocks are missing.
        ValueError: `out` holds something else, the store lacks what the estimator needs or was measured otherwise, or
            the estimator's ridge is singular.
    """
    if dtype not in ("int8", "float16", "float32"):
        raise ValueError(f"an index's dtype must be 'int8', 'float16' or 'float32', got {dtype!r}.")
    if not store.is_complete:
        raise IncompleteStoreError(f"{store.url} is not complete; run its sketch(...) again before building an index.")
    if client is not None and (out is None or store.url is None):
        raise ValueError("workers cannot reach this process's memory; give store and index a path or URL.")
    if not isinstance(estimator, Estimator):
        raise ValueError(f"estimator must be one, such as ReTrac(), got {estimator!r}.")
    estimator.check_training(store)
    kept = np.flatnonzero(~store.deleted)
    if not len(kept):
        raise ValueError(f"all samples of {store.url} are deleted; there is nothing to index.")
    meta: dict[str, Any] = {
        "what": "index",
        "format": FORMAT_VERSION,
        "estimator": estimator.spec(),
        "dtype": dtype,
        "checkpoints": store.weights,
        "timesteps": common_timesteps(store) if estimator.pairing == "matched" else None,
        "sketch_dim": None if _is_exact(store) else store.shape[2],
        "store": _whereabouts(store.url),
        "revision": store.revision,
        "measure": store.fingerprint.get("measure"),
        "fingerprint": {key: store.fingerprint.get(key) for key in COMPARED},
    }
    if "precondition" in store.fingerprint:
        meta["precondition"] = store.fingerprint["precondition"]
    location = zarr_location(out)
    try:
        stored = zarr.open_group(location, mode="r").attrs.get(ATTRIBUTE)
    except FileNotFoundError:
        stored = None
    else:
        if not isinstance(stored, dict) or stored.get("what") != "index":
            raise ValueError(f"{out} holds something that is no index; choose another path.")
        if stored.get("complete"):
            found = differences({k: v for k, v in stored.items() if k not in ("complete", "fit")}, meta)
            if not found and (sound := _if_sound(out, store)) is not None:
                return sound
            other = differences({key: stored[key] for key in ASKED}, {key: meta[key] for key in ASKED})
            if other or (found and meta["store"] is None):
                what = "; ".join(other or found)
                raise ValueError(f"{out} already holds a different index: {what}; choose another path.")
    root = zarr.open_group(location, mode="a")
    root.attrs[ATTRIBUTE] = {"what": "index", "format": FORMAT_VERSION}
    chunks = create_arrays(root, len(store.checkpoints), store.ids[kept], estimator.width(store), dtype)
    columns = root.create_group("column", overwrite=True)
    for name, values in store.columns.items():
        _write_list(columns, name, values[kept])
    source: SketchStore | Url = store if client is None else store.url
    target: zarr.Group | Url = root if client is None else out
    ridges = fit(store, estimator, kept, client)
    common = source, meta["measure"], target, estimator, ridges, dtype
    tasks = [
        Task(f"build-index-{name}-samples-{samples.start}-{samples.stop}", (checkpoint, samples, kept[samples]))
        for checkpoint, name in enumerate(store.checkpoints)
        for samples in chunks
    ]
    results(_build_chunk, tasks, client, shared=common)
    described = {name: ridge.describe() for name, ridge in ridges.items()}
    objects.force_all(root)  # first: what is called complete survives a power cut
    root.attrs[ATTRIBUTE] = {**meta, "fit": described, "complete": True}
    objects.force_all(root)
    return Index(root, out, store)


def _if_sound(url: Url, store: SketchStore) -> Index | None:
    """The complete index at a URL; None where it is on this disk and damaged. Queries check no file again."""
    try:
        index = Index(open_root(url, "index"), url, store)
        if isinstance(index.root.store, LocalStore):
            for number in range(len(index.chunks)):
                index.chunk(number)
            _ = index.columns
    except (KeyError, ValueError) as error:
        logger.warning("%s is damaged and built again: %s", url, error)
        return None
    return index


def chunk_samples(n_samples: int, row_bytes: int) -> int:
    """Samples per chunk of an index."""
    by_bytes = max(1, CHUNK_BYTES // row_bytes)
    return min(by_bytes, max(MIN_CHUNK_SAMPLES, -(-n_samples // MIN_CHUNKS)))


def create_arrays(
    root: zarr.Group, checkpoints: int, ids: npt.NDArray[Any], width: int, dtype: IndexDtype
) -> list[slice]:
    """The empty arrays of an index, their ids written; the sample ranges of their chunks, of about 32 MiB."""
    n, c = len(ids), checkpoints
    size = chunk_samples(n, width * np.dtype(dtype).itemsize)
    dims, nan = ["checkpoint", "sample", "k"], float("nan")
    fill = UNWRITTEN if dtype == "int8" else nan
    new_array(root, "row", shape=(c, n, width), chunks=(1, size, width), dtype=dtype, dims=dims, fill_value=fill)
    for name in ("scale", "norm"):
        new_array(root, name, shape=(c, n), chunks=(1, size), dtype="float32", dims=dims[:2], fill_value=nan)
    _write_list(root, "id", ids, size)
    return blocks(n, size)


def write_rows(
    root: zarr.Group, checkpoint: int, samples: slice, rows: Float32, weight: float, dtype: IndexDtype
) -> None:
    """Encode one chunk's rows `[n, k]` of a checkpoint and write them with their scales and norms."""
    stored, scale = encode(rows, dtype)
    scale = scale * np.float32(weight)
    tiles = range(0, len(stored), NORM_ROWS)
    length = np.concatenate([np.linalg.norm(stored[i : i + NORM_ROWS].astype(np.float32), axis=1) for i in tiles])
    get_array(root, "row")[checkpoint, samples] = stored
    get_array(root, "scale")[checkpoint, samples] = scale
    get_array(root, "norm")[checkpoint, samples] = (length * np.abs(scale) * (1 + 1e-5)).astype(np.float32)


def _build_chunk(
    common: tuple[SketchStore | Url, str | None, zarr.Group | Url, Estimator, Mapping[str, Ridge], IndexDtype],
    checkpoint: int,
    samples: slice,
    kept: npt.NDArray[np.int64],
) -> None:
    """Collapse one chunk: the samples of an index that stand at places `kept` of the store."""
    source, measure, target, estimator, ridges, dtype = common
    store = source if isinstance(source, SketchStore) else open_store(source, measure=measure)
    root = target if isinstance(target, zarr.Group) else zarr.open_group(zarr_location(target), mode="r+")
    name = store.checkpoints[checkpoint]
    rows = np.empty((len(kept), estimator.width(store)), np.float32)
    for some, values in rows_at(store, kept, lambda piece: estimator.train_rows(store, name, piece, ridges.get(name))):
        rows[some] = values
    write_rows(root, checkpoint, samples, rows, store.weights[name], dtype)


def open_index(url: Url) -> Index:
    """Open an existing Index.

    Raises:
        FileNotFoundError: nothing is there.
        ValueError: what is there is no index, one of a newer format, or one whose building was interrupted.
    """
    root = open_root(url, "index")
    if not root.attrs[ATTRIBUTE].get("complete"):  # type: ignore[union-attr]
        raise ValueError(f"the index at {url} was not finished; run its build_index(...) again.")
    return Index(root, url)


@functools.lru_cache(maxsize=4)
def open_on_worker(url: str, meta: str) -> Index:
    """The index at a URL, kept open in this process while its description is the same: its maps outlive a task."""
    return open_index(url)


def _stamp(store: SketchStore) -> Stamp | None:
    """Modification times of all that changes when a store on disk does; None where they cannot tell.

    Every change of a store adds or replaces a file by renaming, which sets the time of its folder. Clocks of file
    systems tick in milliseconds, so that a stamp counts only when its youngest time is some time ago.
    """
    if not isinstance(store.root.store, LocalStore):
        return None
    base = store.root.store.root
    places = [base, base / "parts"]
    for part in store.parts:
        folder = base / part.root.path
        places += [folder, folder / "deleted" / "c", *(folder / name / "commit" for name in part.checkpoints)]
    try:
        times = [place.stat().st_mtime_ns for place in places if place.name != "parts" or place.exists()]
    except FileNotFoundError:
        return None
    return tuple(times) if time.time_ns() - max(times) > SETTLED_NS else None


def _is_exact(store: SketchStore) -> bool:
    projection: Mapping[str, Any] = store.fingerprint.get("projection") or {}
    return projection.get("kind") == "Identity"


def _whereabouts(url: Url) -> str | None:
    """A URL that is good from any working directory, None for memory and for zarr's own stores."""
    if url is None or not isinstance(url, str | os.PathLike):
        return None
    return os.fspath(url) if is_remote(url) else os.path.abspath(os.fspath(url).removeprefix("file://"))


def _write_list(group: zarr.Group, name: str, values: npt.NDArray[Any], size: int | None = None) -> None:
    plain = values.dtype.kind in "biuf"
    dtype = values.dtype if plain else "string"
    length = size or max(1, len(values))
    new_array(group, name, shape=values.shape, chunks=(length,), dtype=dtype, dims=["sample"])[:] = (
        values if plain else values.astype(object)
    )


def _listed(values: npt.NDArray[Any]) -> npt.NDArray[Any]:
    return values if values.dtype.kind in "biuf" else np.array(values.tolist(), dtype=str)
