"""An index as it lies there: a store seen by one estimator, collapsed over timesteps, laid out for scanning."""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import zarr
from zarr.storage import LocalStore, MemoryStore

from retrac_scale.arrays import Bools, Float32, Int64, Samples
from retrac_scale.columns import Column, Places, Texts, as_ids
from retrac_scale.estimators import Estimator, common_timesteps, estimator_from_spec, of_losses
from retrac_scale.estimators.ridge import Ridge
from retrac_scale.index import seals
from retrac_scale.index.chunk import Chunk
from retrac_scale.index.ridges import read_ridges
from retrac_scale.index.segments import (
    ARRAYS,
    DELETED,
    RIDGE,
    Segment,
    column_of,
    names_of_columns,
    place_of,
    segments_of,
    unpacked,
)
from retrac_scale.store import DamagedStoreError, SketchStore, open_store
from retrac_scale.store.compatibility import agreed, check_compatible, slots
from retrac_scale.store.mapping import Mapped, check_mapped, chunk_key, fetch_chunk, mapped_files
from retrac_scale.store.opening import open_root
from retrac_scale.store.part import ROOT, measures_in
from retrac_scale.store.schema import ATTRIBUTE, Url, differences, get_array, read_ids
from retrac_scale.store.stamp import Stamp, stamp_of

KEPT_MAPS = 8192
"""Files that an index keeps mapped; Linux lets a process have some 65,000 (vm.max_map_count)."""


class StaleIndexError(ValueError):
    """The store that an index was built from is no longer what it was."""


class IndexReader:
    """Rows `[c, n, k]` of one estimator, their scales `[c, n]` with the checkpoint weights in them, and the ids.

    Get one from `build_index` or `open_index`. A stored row times its scale is w_c times the estimator's training row,
    and a score the inner product with a query's row. `meta["fit"]` says how each checkpoint's ridge was damped, where
    there is one: `ridges` are there where queries carry it, else the training rows do. Under matched pairing a row has
    a part for each of `meta["slots"]` timesteps, multiplied with `meta["gains"]`, which the query's part is divided by.

    Attributes:
        patient: whether it answers on where its store has gained samples and lost none.
        lacks: how many samples those are, as of the last look at the store.
    """

    def __init__(self, root: zarr.Group, url: Url, store: SketchStore | None = None) -> None:
        self.root = root
        self.url = url
        self.meta = seals.description(root, url)
        self._seals: seals.Seals = self.meta.get("seals", {})  # indexes of earlier releases have none
        self._store = store
        self.segments = segments_of(root, self.meta)
        self._check(f"{one.prefix}{name}/{ROOT}" for one in self.segments for name in ARRAYS)
        self._first = self.segments[0].arrays
        self._chunks: dict[int, Chunk] = {}
        self._files: dict[int, list[Mapped]] = {}
        self._checked: tuple[SketchStore, Stamp] | None = None
        self.patient = False
        self.lacks = 0

    @property
    def estimator(self) -> Estimator:
        """The estimator it was built with."""
        return estimator_from_spec(self.meta["estimator"])

    @property
    def functions(self) -> int:
        """How many measures stand side by side, each at all timesteps."""
        return len(measures_in(self.meta))

    @property
    def checkpoints(self) -> list[str]:
        """Checkpoint names, in the order of the rows."""
        return list(self.meta["checkpoints"])

    @property
    def ids(self) -> npt.NDArray[Any]:
        """Sample ids `[n]`; deleted samples are left out."""
        chunks = tuple(f"{one.prefix}id/c" for one in self.segments)
        self._check(key for key in self._seals if key.startswith(chunks))
        ids = np.concatenate([read_ids(one.group) for one in self.segments])
        return ids if self._alive is None else ids[self._alive]

    @functools.cached_property
    def places(self) -> Places:
        """Where each sample stands."""
        return Places(self.ids)

    @property
    def column_names(self) -> list[str]:
        """Names of the user's columns, sorted."""
        return names_of_columns(self._with_columns)

    @functools.cached_property
    def _with_columns(self) -> list[Segment]:
        """The segments, once the metadata of their columns have been compared with the seals: zarr trusts its lists."""
        folders = tuple(f"{one.prefix}column/" for one in self.segments)
        keys = [key for key in self._seals if key.startswith(folders) and key.endswith(ROOT)]
        with self._or_replaced():
            seals.check(self.root, self._seals, keys, self.url)
        return self.segments

    @property
    def columns(self) -> dict[str, npt.NDArray[Any]]:
        """The user's columns, `{name: [n]}`: booleans, numbers, or texts as arrays of Python's strings."""
        every = {name: self.column(name) for name in self.column_names}
        return {name: values.whole() if isinstance(values, Texts) else values for name, values in every.items()}

    def column(self, name: str, *, read: bool = True) -> Column:
        """A column, or the ids under "id"; without reading it, one of the same type that holds no sample."""
        if name == "id":
            return self.ids if read else as_ids(np.empty(0, self._first["id"].dtype))
        if not read:
            return column_of(self._with_columns, name, lambda array: np.empty(0, array.dtype))
        columns = tuple(f"{one.prefix}column/{name}/" for one in self.segments)
        mapped = ("/code/c/0", "/text/c/0", "/end/c/0", f"column/{name}/c/0")  # compared below, as all numbers are
        self._check(key for key in self._seals if key.startswith(columns) and not key.endswith((*mapped, ROOT)))
        with self._or_replaced():
            column = column_of(self._with_columns, name, self._numbers)
        if self._alive is None:
            return column
        return column.some(self._alive) if isinstance(column, Texts) else column[self._alive]

    def _numbers(self, array: zarr.Array[Any]) -> npt.NDArray[Any]:
        """An array of one chunk, compared with its seal; a map where it can be mapped."""
        return self._chunk_of(array, (0,)) if array.shape[0] else np.empty(0, array.dtype)

    @functools.cached_property
    def shape(self) -> tuple[int, int, int]:
        """(c, n, k)."""
        shapes = [one.shape for one in self.segments]
        n = sum(n for _, n, _ in shapes) if self._alive is None else int(self._alive.sum())
        return shapes[0][0], n, shapes[0][2]

    @functools.cached_property
    def _alive(self) -> Bools | None:
        """Which rows of all segments are those of samples that are not deleted, `[n]`; None for all."""
        if not (name := self.meta.get("deleted")):
            return None
        self._check(key for key in self._seals if key.startswith(f"{DELETED}/{name}/"))
        rows = sum(one.shape[1] for one in self.segments)
        return ~unpacked(get_array(self.root, f"{DELETED}/{name}"), rows)

    @functools.cached_property
    def _places(self) -> list[tuple[Segment, int, slice]]:
        """Of each chunk the segment, its number there, and its rows in all segments."""
        found, start = [], 0
        for one in self.segments:
            found += [(one, i, slice(start + x.start, start + x.stop)) for i, x in enumerate(one.chunks)]
            start += one.shape[1]
        return found

    @property
    def store_places(self) -> npt.NDArray[np.int64]:
        """Where each sample stands in the store, `[n]`."""
        places = np.concatenate([one.places for one in self.segments])
        return places if self._alive is None else places[self._alive]

    def find(self, ids: npt.ArrayLike) -> tuple[Int64, Int64]:
        """The places of some samples, -1 for those that are not here, and where the others stand in the store."""
        places = self.places.find(ids)
        rows = places if self._alive is None else np.flatnonzero(self._alive)[places]
        return places, np.array([place_of(self.segments, row) for row in rows.tolist()], np.int64)

    @functools.cached_property
    def ridges(self) -> dict[str, list[Ridge]]:
        """For each checkpoint the ridges that queries carry, one for each part of a row; none where samples do."""
        self._check(key for key in self._seals if key.startswith(f"{RIDGE}/") and key.endswith(ROOT))
        with self._or_replaced():
            return read_ridges(self.root, self.meta, self._chunk_of)

    def _chunk_of(self, array: zarr.Array[Any], place: tuple[int, ...]) -> npt.NDArray[Any]:
        """A chunk of an array, compared with its seal; a map where it can be mapped."""
        return fetch_chunk(array, place, self._seals.get(chunk_key(array, place).removeprefix(f"{self.root.path}/")))

    @functools.cached_property
    def chunks(self) -> list[slice]:
        """Sample ranges of the chunks, the units of scanning; those that are deleted do not count."""
        rows = [rows for _, _, rows in self._places]
        if self._alive is None:
            return rows
        stops = np.cumsum([0, *(np.count_nonzero(self._alive[some]) for some in rows)]).tolist()
        return [slice(*pair) for pair in itertools.pairwise(stops)]

    def chunk(self, number: int) -> Chunk:
        """One chunk: a map of its files where they can be mapped, read through zarr if not.

        The first maps are kept for the next call, as many as a process may have of them.

        Raises:
            DamagedStoreError: a file is missing or damaged.
        """
        if number in self._chunks:
            check_mapped(self._files[number])
            return self._chunks[number]
        segment, _, place = self._places[number]
        rows = [self._fetched("row", number, c, 0)[0] for c in range(self.shape[0])]
        scale, norm = (self._plane(name, number) for name in ("scale", "norm"))
        on_disk = isinstance(self.root.store, LocalStore | MemoryStore)
        kept = on_disk and len(self._chunks) * (3 * len(rows) + 1) < KEPT_MAPS
        fill = segment.arrays["row"].fill_value
        if np.isnan(scale).any() or any(np.array_equal(row[0, 0], fill, equal_nan=True) for row in rows):
            raise DamagedStoreError(f"rows {place.start} .. {place.stop - 1} of the index {self.url} are missing.")
        alive = None if self._alive is None or self._alive[place].all() else self._alive[place]
        chunk = Chunk(rows, scale, norm, self._ids_of(number), kept=kept, alive=alive)
        if kept:
            keys = [f"{segment.prefix}{key}" for key in self._keys(number)]
            self._files[number] = mapped_files(self.root, keys)
            self._chunks[number] = chunk
        return chunk

    def _keys(self, number: int) -> list[str]:
        """Of the files of a chunk, within its segment."""
        _, own, _ = self._places[number]
        planes = [f"{name}/c/{c}/{own}" for name in ("scale", "norm") for c in range(self.shape[0])]
        return [*(f"row/c/{c}/{own}/0" for c in range(self.shape[0])), *planes, f"id/c/{own}"]

    def rows_at(self, ids: npt.NDArray[Any]) -> Float32:
        """The training rows of some samples of the index, with the checkpoint weights, `[m, c k]`."""
        places = self.places.find(ids)
        numbers = np.searchsorted([samples.stop for samples in self.chunks], places, side="right")
        c, _, k = self.shape
        rows = np.empty((len(ids), c * k), np.float32)
        for number in np.unique(numbers).tolist():
            chunk, here = self.chunk(number), np.flatnonzero(numbers == number)
            own = places[here] - self.chunks[number].start
            own = own if chunk.alive is None else np.flatnonzero(chunk.alive)[own]
            for place, (stored, scale) in enumerate(zip(chunk.rows, chunk.scale, strict=True)):
                rows[here, place * k : (place + 1) * k] = stored[own] * scale[own, None]
        return rows

    def _plane(self, name: str, number: int) -> Float32:
        views = [self._fetched(name, number, c) for c in range(self.shape[0])]
        return views[0] if len(views) == 1 else np.concatenate(views)

    def _ids_of(self, number: int) -> npt.NDArray[Any]:
        segment, own, _ = self._places[number]
        if self._first["id"].dtype.kind in "biuf":
            return self._fetched("id", number)
        self._check([f"{segment.prefix}id/c/{own}"])
        return as_ids(np.asarray(segment.arrays["id"][segment.chunks[own]]))

    def _fetched(self, name: str, number: int, *place: int) -> npt.NDArray[Any]:
        """A chunk's part of an array, at a place `[checkpoint]` or `[checkpoint, 0]`, compared with its seal."""
        segment, own, _ = self._places[number]
        whole = (own,) if not place else (place[0], own, *place[1:])
        with self._or_replaced():
            return self._chunk_of(segment.arrays[name], whole)

    def _check(self, keys: Iterable[str]) -> None:
        with self._or_replaced():
            seals.check(self.root, self._seals, list(keys), self.url)

    @contextlib.contextmanager
    def _or_replaced(self) -> Iterator[None]:
        """What is damaged or missing is told as replaced where another index stands there now."""
        try:
            yield
        except DamagedStoreError as error:
            if self.is_current:
                raise
            raise StaleIndexError(f"the index {self.url} was built again after it was opened; open it anew.") from error

    @property
    def is_current(self) -> bool:
        """Whether the index at its place is still this one, as far as that can be read."""
        try:
            there = seals.description(zarr.open_group(self.root.store_path, mode="r"), self.url)
        except (OSError, KeyError, ValueError, TypeError):
            return True
        return not there.get("complete") or there.get("digest") == self.meta.get("digest")

    def check_store(self) -> SketchStore | None:
        """The store that the index was built from; None when that was in the memory of another process.

        Raises:
            StaleIndexError: the store is gone, has another fingerprint, or has changed since.
        """
        url, store = self.meta["store"], self._store
        if self._checked is not None and stamp_of(self._checked[0]) == self._checked[1]:
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
        found = differences(self.meta["fingerprint"], agreed("query", store.fingerprint))
        if not found and store.revision != self.meta["revision"]:
            found = ["samples, checkpoints or blocks were added, deleted or written anew"]
        self.lacks = int(np.count_nonzero(store.alive)) - self.shape[1] if found and self._only_lacks(store) else 0
        if found and not (self.lacks and self.patient):
            known = url is not None or self.url is None  # else build_index cannot tell whose index it would replace
            raise StaleIndexError(
                f"the store {url or 'in memory'} has changed since the index was built: {'; '.join(found)}; "
                f"build the index again{'' if known else ' at another path'}."
            )
        stamp = stamp_of(store)
        self._checked = None if stamp is None else (store, stamp)
        return store

    def _only_lacks(self, store: SketchStore) -> bool:
        """Whether all that the index holds is in the store as it was, and nothing of it deleted."""
        if not only_grown(self.meta, store.part_digests):
            return False
        return not store.deleted[self.store_places].any()

    def query_rows(self, queries: SketchStore) -> Float32:
        """The estimator's rows of the queries, float32 `[c, q, k]`, without checkpoint weights.

        Raises:
            ValueError: the queries were sketched otherwise than the training side; says which field differs.
        """
        self.check_queries(queries)
        return self.rows_of(queries)

    def check_queries(self, queries: SketchStore) -> None:
        """Raise ValueError unless the queries were sketched as the training side was; says which field differs."""
        here = {**self.meta["fingerprint"], "timesteps": self.meta.get("noise", [])}
        check_compatible(here, self.checkpoints, queries.fingerprint, queries.checkpoints)
        estimator = self.estimator
        estimator.check(queries)
        if estimator.pairing == "matched":
            if common_timesteps(queries) != self.meta["timesteps"]:
                raise ValueError(
                    "matched pairing needs the index's timesteps in the queries; sketch them with like=store and "
                    "without timesteps=."
                )
            if any(slots(here)) and slots(queries.fingerprint) != slots(here):
                raise ValueError(
                    "matched pairing needs the index's noise in the queries, in the same order and with as many draws; "
                    "sketch them with like=store and without timesteps=."
                )
        if estimator.width(queries) != self.shape[2]:
            raise ValueError(
                f"the queries have rows of {estimator.width(queries)} entries, the index of {self.shape[2]}."
            )

    def rows_of(self, side: SketchStore, samples: Samples = slice(None)) -> Float32:
        """Some samples' rows as a query's, `[c, n, k]`, of a store that is known to fit."""
        estimator, ridges = self.estimator, self.ridges
        found = np.stack([estimator.query_rows(side, x, samples, ridges.get(x, ())) for x in self.checkpoints])
        if self.meta.get("gains"):
            gains = np.array([self.meta["gains"][name] for name in self.checkpoints], np.float32)
            c, n, _ = found.shape
            found = (found.reshape(c, n, gains.shape[1], -1) / gains[:, None, :, None]).reshape(c, n, -1)
        return of_losses(found, measures_in(self.meta)) if "concept" in side.fingerprint else found

    def __repr__(self) -> str:
        c, n, k = self.shape
        return f"Index({self.url!r}: {self.estimator}, {c} checkpoints, {n} samples, k = {k})"


def only_grown(meta: Mapping[str, Any], parts: Sequence[Sequence[str]]) -> bool:
    """Whether a store of such parts still holds all that an index was built of, unchanged but for deletions."""
    there = iter([list(part) for part in parts])  # what came since stands at the end, of each measure
    return all(part in there for part in meta.get("parts", [None]))


def complete_root(url: Url) -> zarr.Group:
    """The group of an index whose building was finished.

    Raises:
        FileNotFoundError: nothing is there.
        ValueError: what is there is no index, one of a newer format, or one whose building was interrupted.
    """
    root = open_root(url, "index")
    if not root.attrs[ATTRIBUTE].get("complete"):  # type: ignore[union-attr]
        raise ValueError(f"the index at {url} was not finished; run its build_index(...) again.")
    return root
