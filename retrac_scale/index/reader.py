"""An index as it lies there: a store seen by one estimator, collapsed over timesteps, laid out for scanning."""

from __future__ import annotations

import functools
import time
from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt
import zarr
from zarr.storage import LocalStore, MemoryStore

from retrac_scale.arrays import Float32
from retrac_scale.columns import Column, Texts
from retrac_scale.estimators import Estimator, common_timesteps, estimator_from_spec
from retrac_scale.index import seals
from retrac_scale.index.columns import column_names, read_column
from retrac_scale.index.scan import Chunk
from retrac_scale.store import DamagedStoreError, SketchStore, open_store
from retrac_scale.store.compatibility import agreed, check_compatible, slots
from retrac_scale.store.mapping import fetch_chunk
from retrac_scale.store.opening import open_root
from retrac_scale.store.part import ROOT
from retrac_scale.store.schema import ATTRIBUTE, Url, blocks, differences, get_array, read_ids

ARRAYS = ("row", "scale", "norm", "id")
KEPT_MAPS = 8192
"""Files that an index keeps mapped; Linux lets a process have some 65,000 (vm.max_map_count)."""
SETTLED_NS = 10**9
Stamp = tuple[int, ...]


class StaleIndexError(ValueError):
    """The store that an index was built from is no longer what it was."""


class IndexReader:
    """Rows `[c, n, k]` of one estimator, their scales `[c, n]` with the checkpoint weights in them, and the ids.

    Get one from `build_index` or `open_index`. A stored row times its scale is w_c times the estimator's training row:
    preconditioned, where the estimator does that, so that a query's own row is plain and the score an inner product.
    `meta["fit"]` then says how each checkpoint's ridge was damped. Under matched pairing a row has a part for each of
    `meta["slots"]` timesteps, multiplied with `meta["gains"]`, which the query's part is divided by.
    """

    def __init__(self, root: zarr.Group, url: Url, store: SketchStore | None = None) -> None:
        self.root = root
        self.url = url
        self.meta = seals.description(root, url)
        self._seals: seals.Seals = self.meta.get("seals", {})  # indexes of earlier releases have none
        self._store = store
        self._check(f"{name}/{ROOT}" for name in ARRAYS)
        self._arrays = {name: get_array(root, name) for name in ARRAYS}
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
        self._check(key for key in self._seals if key.startswith("id/c"))
        return read_ids(self.root)

    @property
    def column_names(self) -> list[str]:
        """Names of the user's columns, sorted."""
        return column_names(self.root)

    @property
    def columns(self) -> dict[str, npt.NDArray[Any]]:
        """The user's columns, `{name: [n]}`."""
        every = {name: self.column(name) for name in self.column_names}
        return {name: values.whole() if isinstance(values, Texts) else values for name, values in every.items()}

    def column(self, name: str, *, read: bool = True) -> Column:
        """A column, or the ids under "id"; without reading it, one of the same type that holds no sample."""
        if name == "id":
            return self.ids if read else _listed(np.empty(0, self._arrays["id"].dtype))
        if not read:
            return read_column(self.root, name, slice(0))
        self._check(key for key in self._seals if key.startswith(f"column/{name}/"))
        return read_column(self.root, name)

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
        rows = [self._fetched("row", c, number, 0)[0] for c in range(self.shape[0])]
        scale, norm = (self._plane(name, number) for name in ("scale", "norm"))
        on_disk = isinstance(self.root.store, LocalStore | MemoryStore)
        kept = on_disk and len(self._chunks) * (3 * len(rows) + 1) < KEPT_MAPS
        samples = self.chunks[number]
        fill = self._arrays["row"].fill_value
        if np.isnan(scale).any() or any(np.array_equal(row[0, 0], fill, equal_nan=True) for row in rows):
            raise DamagedStoreError(
                f"samples {samples.start} .. {samples.stop - 1} of the index {self.url} are missing."
            )
        chunk = Chunk(rows, scale, norm, self._ids_of(number), kept=kept)
        if kept:
            self._chunks[number] = chunk
        return chunk

    def _plane(self, name: str, number: int) -> Float32:
        views = [self._fetched(name, c, number) for c in range(self.shape[0])]
        return views[0] if len(views) == 1 else np.concatenate(views)

    def _ids_of(self, number: int) -> npt.NDArray[Any]:
        if self._arrays["id"].dtype.kind in "biuf":
            return self._fetched("id", number)
        self._check([f"id/c/{number}"])
        return _listed(np.asarray(self._arrays["id"][self.chunks[number]]))

    def _fetched(self, name: str, *place: int) -> npt.NDArray[Any]:
        """A chunk of an array, compared with its seal."""
        key = f"{name}/c/{'/'.join(map(str, place))}"
        return fetch_chunk(self._arrays[name], place, self._seals.get(key))

    def _check(self, keys: Iterable[str]) -> None:
        seals.check(self.root, self._seals, list(keys), self.url)

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
        found = differences(self.meta["fingerprint"], agreed("query", store.fingerprint))
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
        return self.rows_of(queries)

    def rows_of(self, side: SketchStore, samples: slice = slice(None)) -> Float32:
        """Some samples' rows as a query's, `[c, n, k]`, of a store that is known to fit."""
        found = np.stack([self.estimator.rows(side, name, samples) for name in self.checkpoints])
        if self.meta.get("gains"):
            gains = np.array([self.meta["gains"][name] for name in self.checkpoints], np.float32)
            c, n, _ = found.shape
            found = (found.reshape(c, n, gains.shape[1], -1) / gains[:, None, :, None]).reshape(c, n, -1)
        return found

    def __repr__(self) -> str:
        c, n, k = self.shape
        return f"Index({self.url!r}: {self.estimator}, {c} checkpoints, {n} samples, k = {k})"


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


def open_reader(url: Url) -> IndexReader:
    """Open an existing index to be read; raises as `complete_root`."""
    return IndexReader(complete_root(url), url)


@functools.lru_cache(maxsize=4)
def open_on_worker(url: str, meta: str) -> IndexReader:
    """The index at a URL, kept open in this process while its description is the same: its maps outlive a task."""
    return open_reader(url)


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


def _listed(values: npt.NDArray[Any]) -> npt.NDArray[Any]:
    return values if values.dtype.kind in "biuf" else np.array(values.tolist(), dtype=str)
